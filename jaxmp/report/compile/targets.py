"""Compile targets: the TPU and H100 compilers of XLA, on a machine without either.

Both compilers come from PyPI (`pip install 'jaxmp[targets]'`) and need a process that
was started with `TARGET_ENVIRONMENT`. What they compile does not run here, but its
memory, traffic and dtypes can be read.
"""

import difflib
import importlib.resources
import importlib.util
import math
import os
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxmp.errors import MissingTargetPackage, UnknownTarget

TARGET_ENVIRONMENT = MappingProxyType(
    {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
)
"""What the environment of a compiling process needs before it imports JAX."""

_SQUARES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))


class _Slice(NamedTuple):
    """The slices of a TPU generation."""

    generation: str
    shapes: tuple[tuple[int, ...], ...]
    devices_per_chip: int = 1

    def topologies(self) -> dict[int, str]:
        """Names of topologies, by their number of devices."""
        return {
            math.prod(shape) * self.devices_per_chip: (
                f"{self.generation}:{'x'.join(map(str, shape))}"
            )
            for shape in self.shapes
        }


_TPUS = MappingProxyType(
    {
        "tpu-v4": _Slice("v4", _CUBES, 2),
        "tpu-v5e": _Slice("v5e", _SQUARES),
        "tpu-v5p": _Slice("v5p", _CUBES),
        "tpu-v6e": _Slice("v6e", _SQUARES),
        "tpu7x": _Slice("tpu7x", _CUBES, 2),
    }
)
_H100S_PER_HOST = 8
_DEVICE_KINDS = MappingProxyType(
    {
        "h100": "NVIDIA H100 80GB HBM3",
        "tpu-v4": "TPU v4",
        "tpu-v5e": "TPU v5 lite",
        "tpu-v5p": "TPU v5",
        "tpu-v6e": "TPU v6 lite",
        "tpu7x": "TPU7x",
    }
)
_PACKAGES = {
    "h100": ("jax_cuda12_plugin", "nvidia.cuda_nvcc", "flatbuffers"),
    "tpu": ("libtpu", "flatbuffers"),
}


class Target(NamedTuple):
    """What a program is compiled for.

    Attributes:
      name: a name of `targets()`.
      devices: how many; None for as many as the program is written for.
    """

    name: str
    devices: int | None = None

    def __str__(self) -> str:
        return self.name if self.devices is None else f"{self.name}:{self.devices}"

    @property
    def platform(self) -> str:
        """The name that JAX lowers a program for."""
        if self.is_local:
            return {"gpu": "cuda"}.get(self.name, self.name)
        return "cuda" if self.name == "h100" else "tpu"

    @property
    def device_kind(self) -> str:
        """What its devices call themselves; empty for this machine's own."""
        return _DEVICE_KINDS.get(self.name, "")

    @property
    def is_local(self) -> bool:
        """Whether its devices are this machine's."""
        return self.name in ("cpu", "gpu", "tpu")


def targets() -> tuple[str, ...]:
    """Lists the names of compile targets.

    Returns:
      A tuple of names. A count of devices may follow one, as in `"tpu-v5e:16"` and
      `"h100:8"`. `"gpu"` and `"tpu"` are there if this machine has such devices.

    Example:
      >>> from jaxmp.report import targets
      >>> "h100" in targets()
      True
    """
    local = {device.platform for device in jax.local_devices()} - {"cpu"}
    return ("cpu", *sorted(local), "h100", *_TPUS)


def read_target(target: str | Target) -> Target:
    """Reads the name of a target, with or without a count.

    Raises:
      UnknownTarget: for a name or count that does not exist.
    """
    if isinstance(target, Target):
        return target
    name, _, count = str(target).partition(":")
    if name not in targets():
        near = difflib.get_close_matches(name, targets(), n=2, cutoff=0.4)
        meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownTarget(
            f"There is no target {target!r}.{meant} Targets: {', '.join(targets())}; "
            "a number of devices may follow, as in 'tpu-v5e:16'."
        )
    if not count and ":" not in str(target):
        return Target(name)
    if not count.isdigit() or not _has_count(name, int(count)):
        raise UnknownTarget(
            f"There is no target {target!r}: {name} has {_counts(name)} devices. "
            "Write one of these after the colon, or no number for one device."
        )
    return Target(name, int(count))


def has_target(target: str) -> bool:
    """Returns whether the packages that compile for a target are installed.

    Args:
      target: a name of `targets()`, with or without a count.

    Returns:
      A boolean; nothing is imported.

    Raises:
      UnknownTarget: for a name that does not exist.

    Example:
      >>> from jaxmp.report import has_target
      >>> isinstance(has_target("h100"), bool)
      True
    """
    return not missing_packages(read_target(target))


def target_devices(target: str) -> list[Any]:
    """Returns the devices of a target, to compile for.

    Args:
      target: a name of `targets()`, with or without a count.

    Returns:
      Devices without a machine; put them into a sharding and compile for that.

    Raises:
      UnknownTarget: for a name that does not exist.
      MissingTargetPackage: if the packages of the `targets` extra are missing, or the
        process was started without `TARGET_ENVIRONMENT`.

    Example:
      >>> from jaxmp.report import has_target, target_devices
      >>> if has_target("h100"):
      ...     assert "H100" in target_devices("h100")[0].device_kind
    """
    read = read_target(target)
    if read.is_local:
        return jax.devices(read.name)[: read.devices]
    check_packages(read)
    unset = [k for k, v in TARGET_ENVIRONMENT.items() if os.environ.get(k) != v]
    if unset:
        raise MissingTargetPackage(
            f"Compiling for {target!r} in this process needs an environment that sets "
            f"{dict(TARGET_ENVIRONMENT)} before JAX is imported. This one sets "
            f"{unset} otherwise. Set them, or use jaxmp.report.compile_step, which "
            "starts a process of its own."
        )
    if read.name == "h100":
        return _h100s(read.devices or 1)
    names = _TPUS[read.name].topologies()
    name = names.get(read.devices or 0, next(iter(names.values())))
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return devices[: read.devices]


def _h100s(count: int) -> list[Any]:
    description = importlib.resources.files("jaxmp.report") / "_h100.txtpb"
    hosts, rest = divmod(count, _H100S_PER_HOST)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=description.read_text(),
        topology=f"1x1x{rest}" if rest else f"1x{hosts}x{_H100S_PER_HOST}",
    ).devices


def compile_for(
    target: str, fun: Callable[..., Any], *args: Any, **jit_kwargs: Any
) -> jax.stages.Compiled:
    """Compiles a function for one device of a target, in this process.

    Args:
      target: a name of `targets()`.
      fun: a function of pytrees of arrays; compiled by `jax.jit`.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      **jit_kwargs: those of `jax.jit`, such as `donate_argnums`.

    Returns:
      What `.compile()` returns: `memory_analysis()`, `cost_analysis()` (empty for the
      H100) and `as_text()` are read from it.

    Raises:
      UnknownTarget: for a name that does not exist.
      MissingTargetPackage: as for `target_devices`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.report import compile_for
      >>> x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)
      >>> compiled = compile_for("cpu", lambda x: x + 1, x)
      >>> compiled.memory_analysis().output_size_in_bytes == 2 * 128 * 128
      True
    """
    sharding = jax.sharding.SingleDeviceSharding(target_devices(target)[0])
    shapes = jax.eval_shape(lambda *args: args, *args)
    jitted = jax.jit(fun, in_shardings=sharding, out_shardings=sharding, **jit_kwargs)
    return jitted.lower(*shapes).compile()


def check_packages(target: Target) -> None:
    """Raises `MissingTargetPackage` unless a target's compiler is installed."""
    missing = missing_packages(target)
    if missing:
        raise MissingTargetPackage(
            f"Compiling for {str(target)!r} needs packages that are not installed: "
            f"{', '.join(missing)}. Run: pip install 'jaxmp[targets]'"
        )


def missing_packages(target: Target) -> list[str]:
    """What has to be installed before a target can be compiled for."""
    if target.is_local:
        return []
    kind = "h100" if target.name == "h100" else "tpu"
    return [name for name in _PACKAGES[kind] if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _has_count(name: str, count: int) -> bool:
    if name in _TPUS:
        return count == 1 or count in _TPUS[name].topologies()
    if name == "h100":
        return count in range(1, 9) or count in range(8, 1025, _H100S_PER_HOST)
    return 1 <= count <= len(jax.devices(name))


def _counts(name: str) -> str:
    if name in _TPUS:
        return ", ".join(map(str, (1, *_TPUS[name].topologies())))
    if name == "h100":
        return "1 to 8, or a multiple of 8 up to 1024,"
    return f"1 to {len(jax.devices(name))}"
