"""What this machine's devices can do in half precision and below, and what to use."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp.cli._next_steps import (
    Machine,
    find_hardware,
    find_outdated,
    next_steps,
)
from jaxmp.cli._output import Output
from jaxmp.policy import get_policy
from jaxmp.policy.dtypes import policy_name_for
from jaxmp.report import check_policy, chips, has_target, targets
from jaxmp.report.compile.chips import SMALL_FORMATS, Chip, chip_of, format_of, units_of
from jaxmp.report.compile.known_devices import known_device
from jaxmp.report.compile.payoffs import payoff_sentence
from jaxmp.report.compile.progress import Progress

KINDS = ("emulated", "no-targets", "not-native")

_PACKAGES = (
    "jaxmp",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "jmp",
    "chex",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
_DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
_QUANTISING = dict(zip(SMALL_FORMATS, ("mixed_fp8", "mixed_int8"), strict=True))
WHEN_HALF_DOES_NOT_HELP = (
    "Half precision saves time where matmuls or memory traffic are what a step waits "
    "for. It brings little to a small model (launches and the host dominate), to an "
    "input pipeline that is the bottleneck, to embedding lookups and optimizers that "
    "stay in float32, and to matmuls whose sizes are not multiples of 8 (GPU) or 128 "
    "(TPU). `jaxmp audit` shows the sizes, `jaxmp report` how much there is to gain."
)


WHEN_SMALL_FORMATS_DO_NOT_HELP = (
    "Float8 and int8 need scales, rounding and transposed copies of every operand. "
    "Only wide matmuls save more time than that costs: small models get slower."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--policy",
        help="such as mixed_fp8: also says if a device does not multiply its format",
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        help="to ask about --policy instead of this machine, such as tpu-v5e",
    )


def run(options: argparse.Namespace, progress: Progress) -> Output:
    """Looks at the machine."""
    progress.say("starting the devices")
    versions = _versions()
    devices = [_device(device) for device in _unlike_devices()]
    notes = [*_notes(devices), WHEN_HALF_DOES_NOT_HELP]
    answers = _answers(options.policy, options.target or _unlike_devices())
    if answers:
        notes += [*map(str, answers), WHEN_SMALL_FORMATS_DO_NOT_HELP]
    installed = {name: has_target(name) for name in targets() if name in chips}
    machine = Machine(
        devices, versions, installed, os.environ, find_hardware(), find_outdated()
    )
    data = {
        "versions": versions,
        "devices": devices,
        "targets": installed,
        "notes": notes,
        "what to do": next_steps(machine),
    }
    kinds = {"emulated"} if all(device["emulated"] for device in devices) else set()
    if not all(installed.values()):
        kinds.add("no-targets")
    if any(answer.warning for answer in answers):
        kinds.add("not-native")
    return Output(
        text=_text(data), data=data, to_html=_page(data), kinds=frozenset(kinds)
    )


class _Answer(NamedTuple):
    """Whether a device multiplies what a policy quantises to.

    Attributes:
      warning: if it does not.
      finding: if it does.
    """

    warning: str
    finding: str

    def __str__(self) -> str:
        return self.warning or self.finding


def _answers(policy: str | None, devices: Sequence[Any]) -> list[_Answer]:
    if policy is None or (quantize := get_policy(policy).quantize) is None:
        return []
    found = []
    for device in devices:
        name, _, chip = known_device(device)
        finding = f"{name} multiplies {format_of(quantize)}"
        pays = "" if chip is None else payoff_sentence(chip, f"mixed_{quantize}")
        finding += f": {pays}." if pays else "."
        found.append(_Answer(check_policy(policy, device), finding))
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _unlike_devices() -> list[Any]:
    return list({device.device_kind: device for device in jax.local_devices()}.values())


def _device(device: Any) -> dict[str, Any]:
    chip = chip_of(device.device_kind)
    is_emulated = device.platform == "cpu"
    units = units_of(device)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "count": sum(d.device_kind == device.device_kind for d in jax.local_devices()),
        "emulated": is_emulated,
        "rates": {} if chip is None else _rates(chip),
        "multiplies": None if units is None else sorted(units.formats),
        "source": "" if chip is None else chip.source,
        "policy": policy_name_for(device),
    }


def _rates(chip: Chip) -> dict[str, float]:
    """Rates of matmuls relative to float32 as JAX multiplies it by default."""
    whole = chip.matmul_rate("float32")
    strict = chip.matmul_rate("float32", "highest")
    rates = {dtype: chip.matmul_rate(dtype) / whole for dtype in _DTYPES}
    return rates | {"float32 at precision highest": strict / whole}


def _notes(devices: list[dict[str, Any]]) -> list[str]:
    notes = []
    if all(device["emulated"] for device in devices):
        notes.append(
            "The CPU emulates half precision: it saves no time here. Results are those "
            "of a GPU or TPU but for the order of sums, so programs can be tested."
        )
    for device in devices:
        if device["platform"] == "tpu":
            notes.append(
                "A TPU multiplies float32 matrices in bfloat16 unless "
                "jax_default_matmul_precision says otherwise: bfloat16 saves memory "
                "and traffic here, not FLOPs."
            )
    config: Any = jax.config
    if config.jax_enable_x64:
        notes.append("jax_enable_x64 is on: float64 arrays of JAX are never cast.")
    if config.jax_default_matmul_precision:
        notes.append(
            f"jax_default_matmul_precision={config.jax_default_matmul_precision!r}: "
            "it sets how float32 matmuls are computed, whatever the policy."
        )
    if flags := os.environ.get("XLA_FLAGS"):
        notes.append(f"XLA_FLAGS={flags!r} is set and changes what XLA compiles.")
    return notes


def _text(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {x}" for name, x in data["versions"].items())
    installed = [name for name, there in data["targets"].items() if there]
    missing = [name for name, there in data["targets"].items() if not there]
    lines = [versions, "", _table.text_table(*_device_table(data))]
    lines += ["", f"Compile targets installed: {', '.join(installed) or 'none'}"]
    if missing:
        repair = "(pip install 'jaxmp[targets]')"
        lines.append(f"Compile targets not installed: {', '.join(missing)} {repair}")
    lines += [f"\n{note}" for note in data["notes"]]
    steps = [f"{i}. {step}" for i, step in enumerate(data["what to do"], start=1)]
    return "\n".join([*lines, "\nWhat to do:", *steps])


def _page(data: dict[str, Any]) -> Callable[[str], None]:
    return _html.writer(
        "This machine and half precision",
        _html.table(("package", "version"), data["versions"].items()),
        _html.table(*_device_table(data)),
        _html.table(("compile target", "installed"), data["targets"].items()),
        *map(_html.paragraph, data["notes"]),
        _html.paragraph("What to do:"),
        *map(_html.paragraph, data["what to do"]),
    )


def _device_table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["device", "number", *(f"{dtype} x float32" for dtype in _DTYPES)]
    columns += _QUANTISING.values()
    rows = [
        [
            device["device"],
            str(device["count"]),
            *(_rate(device, dtype) for dtype in _DTYPES),
            *(_native(device, name) for name in _QUANTISING),
            device["policy"],
        ]
        for device in data["devices"]
    ]
    return [*columns, "recommended policy"], rows


def _rate(device: dict[str, Any], dtype: str) -> str:
    if device["emulated"]:
        return "emulated"
    rate = device["rates"].get(dtype)
    return "unknown" if rate is None else f"{rate:.3g}"


def _native(device: dict[str, Any], name: str) -> str:
    if device["emulated"]:
        return "emulated"
    if device["multiplies"] is None:
        return "unknown"
    return "native" if name in device["multiplies"] else "in half"
