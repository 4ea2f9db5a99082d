"""What each chip can do at most: published peaks, in one table, with their sources.

JAX shows one chip of a TPU v4 or TPU7x as two devices; figures are per device.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxmp._views.numbers import GIB

_HALF = ("bfloat16", "float16")


SMALL_FORMATS = ("float8", "int8")


def format_of(quantize: str) -> str:
    """Which of `SMALL_FORMATS` a policy's `quantize` multiplies in."""
    return "int8" if quantize.startswith("int8") else "float8"


class Units(NamedTuple):
    """Which formats smaller than half a device multiplies as they are.

    A program may hold float8 for a chip without units for it: that chip converts it,
    and multiplies in half.

    Attributes:
      platform: `"gpu"`, `"tpu"` or `"cpu"`.
      formats: those of `SMALL_FORMATS` that it has units for.
    """

    platform: str
    formats: frozenset[str]


class Calibration(NamedTuple):
    """How near steps came to the peaks of a chip on which they were timed.

    Attributes:
      share_of_peaks: what operations reach of the peak of their matmuls, or of the
        bandwidth of the memory.
      launch: seconds that each operation takes besides.
      source: what was timed, and how.
    """

    share_of_peaks: float
    launch: float
    source: str


class Chip(NamedTuple):
    """The peaks of one device.

    Attributes:
      name: what its maker calls it.
      memory: bytes of memory that its compiler lets a program use.
      bandwidth: bytes per second between that memory and the device.
      flops: FLOPs per second of a dense matmul, by dtype of the operands.
      default: the format in which `float32` operands are multiplied by default:
        `"tensorfloat32"` on NVIDIA GPUs, `"bfloat16"` on TPUs.
      source: where the figures were published.
      calibration: what timed steps reach of the peaks; None if none were timed.
    """

    name: str
    memory: int
    bandwidth: float
    flops: Mapping[str, float]
    default: str
    source: str
    calibration: Calibration | None = None

    @property
    def units(self) -> Units:
        """The small formats that have a peak of their own."""
        platform = "tpu" if self.default == "bfloat16" else "gpu"
        return Units(platform, frozenset(SMALL_FORMATS).intersection(self.flops))

    def matmul_rate(self, dtype: str, precision: str = "default") -> float:
        """FLOPs per second of a matmul.

        Args:
          dtype: of its operands. If the chip has no units for it, the next wider one
            counts.
          precision: `"default"`, `"high"` or `"highest"`, as XLA writes it. A TPU
            multiplies float32 in 1, 3 or 6 passes of bfloat16; an NVIDIA GPU uses
            TensorFloat-32 for the first, and its float32 units for the last.
        """
        if dtype == "float32":
            if self.default == "bfloat16":
                passes = {"default": 1, "high": 3, "highest": 6}[precision]
                return self.flops["bfloat16"] / passes
            if precision == "default":
                dtype = self.default
        for name in (dtype, *_WIDER.get(_family(dtype), ())):
            if name in self.flops:
                return self.flops[name]
        return self.flops["float32" if "float32" in self.flops else "bfloat16"]


_WIDER = {
    "float8": ("float8", "bfloat16", "float16"),
    "int8": ("int8", "bfloat16", "float16"),
    "bfloat16": ("bfloat16", "float32"),
    "float16": ("float16", "bfloat16"),
}


def _family(dtype: str) -> str:
    if dtype.startswith("float8"):
        return "float8"
    return "int8" if dtype in ("int8", "uint8", "int4", "uint4") else dtype


# Fitted by examples/benchmarks/calibration.py, which shows how far off it is.
_H100_CALIBRATION = Calibration(
    share_of_peaks=0.66,
    launch=2.8e-6,
    source="five training steps of ResNet-50 and GPT-2 small, timed on an NVIDIA H100 "
    "80GB (SXM5) with jax 0.11.2: examples/benchmarks/calibration.py",
)


def _tpu(
    name: str, gib: float, gb_per_s: float, tflops: Mapping[str, float], page: str
) -> Chip:
    flops = {dtype: rate * 1e12 for dtype, rate in tflops.items()}
    source = f"Google, Cloud TPU documentation, docs.cloud.google.com/tpu/docs/{page}"
    memory = int(gib * GIB)
    return Chip(name, memory, gb_per_s * 1e9, flops, "bfloat16", source)


def _gpu(
    name: str, gib: float, gb_per_s: float, tflops: Mapping[str, float], sheet: str
) -> Chip:
    flops = {dtype: rate * 1e12 for dtype, rate in tflops.items() if dtype != "half"}
    flops |= {dtype: tflops["half"] * 1e12 for dtype in _HALF if "half" in tflops}
    default = "tensorfloat32" if "tensorfloat32" in tflops else "float32"
    source = f"NVIDIA, {sheet}, dense rates"
    return Chip(name, int(gib * GIB), gb_per_s * 1e9, flops, default, source)


chips: Mapping[str, Chip] = MappingProxyType(
    {
        "h100": _gpu(
            "NVIDIA H100 80GB (SXM5)",
            84929347584 / GIB,
            3352.32,
            {"float8": 1978.9, "int8": 1978.9, "half": 989.4}
            | {"tensorfloat32": 494.7, "float32": 66.9},
            "H100 Tensor Core GPU Architecture, table 3",
        )._replace(calibration=_H100_CALIBRATION),
        "tpu-v4": _tpu("TPU v4, half a chip", 15.25, 614, {"bfloat16": 137.5}, "v4"),
        "tpu-v5e": _tpu("TPU v5e", 15.75, 819, {"bfloat16": 197, "int8": 394}, "v5e"),
        "tpu-v5p": _tpu("TPU v5p", 95.73, 2765, {"bfloat16": 459, "int8": 918}, "v5p"),
        "tpu-v6e": _tpu("TPU v6e", 31.24, 1640, {"bfloat16": 918, "int8": 1836}, "v6e"),
        "tpu7x": _tpu(
            "TPU7x (Ironwood), half a chip",
            94.74,
            3690,
            {"bfloat16": 1153.5, "float8": 2307},
            "tpu7x",
        ),
        "a100": _gpu(
            "NVIDIA A100 80GB (SXM4)",
            80,
            2039,
            {"half": 312, "tensorfloat32": 156, "float32": 19.5, "int8": 624},
            "A100 Tensor Core GPU datasheet",
        ),
        "v100": _gpu(
            "NVIDIA V100 32GB (SXM2)",
            32,
            900,
            {"float16": 125, "float32": 15.7},
            "V100 Tensor Core GPU datasheet",
        ),
        "t4": _gpu(
            "NVIDIA T4",
            16,
            320,
            {"float16": 65, "float32": 8.1, "int8": 130},
            "T4 Tensor Core GPU datasheet",
        ),
        "l4": _gpu(
            "NVIDIA L4",
            24,
            300,
            {"half": 121, "tensorfloat32": 60, "float32": 30.3}
            | {"float8": 242.5, "int8": 242.5},
            "L4 Tensor Core GPU datasheet",
        ),
    }
)
"""The table: the compile targets, then devices that `doctor` knows by their name."""

_DEVICE_KINDS = (
    (r"H100|H200", "h100"),
    (r"A100", "a100"),
    (r"V100", "v100"),
    (r"\bT4\b", "t4"),
    (r"\bL4\b", "l4"),
    (r"TPU v4", "tpu-v4"),
    (r"TPU v5 ?(lite|e)", "tpu-v5e"),
    (r"TPU v5", "tpu-v5p"),
    (r"TPU v6", "tpu-v6e"),
    (r"TPU ?7x|TPU v7", "tpu7x"),
)


# The H100s of other memories, and the H200, were not timed.
_TIMED_KINDS = r"H100 80GB HBM3"


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a `jax.Device.device_kind` names; None if its peaks are unknown."""
    for pattern, name in _DEVICE_KINDS:
        if re.search(pattern, device_kind):
            chip = chips[name]
            is_timed = re.search(_TIMED_KINDS, device_kind)
            return chip if is_timed else chip._replace(calibration=None)
    return None


class _FirstGpu(NamedTuple):
    generation: str
    capability: tuple[int, int]


# NVIDIA's first GPUs with units for a format ("CUDA C++ Programming Guide", Tensor Core
# input types by compute capability).
_FIRST_GPUS = MappingProxyType(
    {"float8": _FirstGpu("Ada", (8, 9)), "int8": _FirstGpu("Turing", (7, 5))}
)


def where_native(name: str) -> str:
    """Names the devices with units for one of `SMALL_FORMATS`."""
    has = [chip for chip, known in chips.items() if name in known.units.formats]
    tpus = [chip for chip in has if chips[chip].units.platform == "tpu"]
    gpus = f"NVIDIA GPUs from {_FIRST_GPUS[name].generation} on"
    return f"{', '.join(tpus)} and {gpus}"


def units_of(device: Any) -> Units | None:
    """Which small formats a device multiplies as they are.

    Args:
      device: a `jax.Device`. Only `platform`, `device_kind` and `compute_capability`
        are read.

    Returns:
      Its units; None if nothing is known of it.
    """
    if device.platform == "cpu":
        return Units("cpu", frozenset())
    chip = chip_of(device.device_kind)
    if chip is not None:
        return chip.units
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform not in ("gpu", "cuda") or not re.match(r"\d+\.\d+$", capability):
        return None
    major, minor = map(int, capability.split("."))
    has = (
        name
        for name, first in _FIRST_GPUS.items()
        if (major, minor) >= first.capability
    )
    return Units("gpu", frozenset(has))
