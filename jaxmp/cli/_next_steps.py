"""What to do on a machine, after `doctor` has looked at it."""

import glob
import importlib.metadata
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmp.report.compile.chips import chip_of, chips

_ASK = "python -m jaxmp {} FILE.py:MODEL --inputs 'f32[64,128]'"


class _Hardware(NamedTuple):
    name: str
    platforms: frozenset[str]
    driver: str
    install: str


_HARDWARE = {
    "cuda": _Hardware(
        "an NVIDIA GPU",
        frozenset({"gpu", "cuda"}),
        r"jax-cuda\d+-plugin",
        "Install its part of JAX: pip install 'jax[cuda12]'",
    ),
    "rocm": _Hardware(
        "an AMD GPU",
        frozenset({"gpu", "rocm"}),
        r"jax-rocm\d+-plugin",
        "Install JAX for ROCm, as AMD's documentation says.",
    ),
    "tpu": _Hardware(
        "a TPU",
        frozenset({"tpu"}),
        "libtpu",
        "Install its part of JAX: pip install 'jax[tpu]'",
    ),
}


class Machine(NamedTuple):
    """What decides about what to do.

    Attributes:
      devices: rows of `doctor`.
      versions: of installed packages, by name.
      targets: whether the compiler of each target is installed.
      environment: variables of this process.
      hardware: of `"cuda"`, `"rocm"` and `"tpu"`, what there are device files for.
      outdated: requirements of jaxmp that installed packages do not meet.
    """

    devices: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    targets: Mapping[str, bool]
    environment: Mapping[str, str]
    hardware: Sequence[str] = ()
    outdated: Sequence[str] = ()


def next_steps(machine: Machine) -> list[str]:
    """Says what to do, the most urgent first."""
    return [
        *_updates(machine),
        *_hidden(machine),
        *_policy(machine),
        *_commands(machine),
    ]


def find_hardware() -> list[str]:
    """Looks for accelerators by their device files, whatever JAX can use."""
    found = {
        "cuda": os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi"),
        "rocm": os.path.exists("/dev/kfd"),
        "tpu": glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"),
    }
    return [name for name, there in found.items() if there]


def find_outdated(
    requirements: Sequence[str] | None = None,
    installed: Mapping[str, str] | None = None,
) -> list[str]:
    """Lists requirements that installed packages are too old for.

    Args:
      requirements: such as `"jax>=0.10"`; by default those of jaxmp.
      installed: versions by name; by default those of this environment.
    """
    found = []
    for requirement in _requirements() if requirements is None else requirements:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement.replace(" ", ""))
        if match is None:
            continue
        name, least = match.groups()
        version = _version(name) if installed is None else installed.get(name)
        if version is not None and _numbers(version) < _numbers(least):
            found.append(requirement)
    return found


def _requirements() -> Sequence[str]:
    try:
        return importlib.metadata.requires("jaxmp") or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(n) for n in re.findall(r"\d+", version)[:3]]
    return (*numbers, *(0,) * (3 - len(numbers)))


def _updates(machine: Machine) -> list[str]:
    steps = []
    if machine.outdated:
        shown = " ".join(f"'{requirement}'" for requirement in machine.outdated)
        steps.append(f"Update what is too old for jaxmp: pip install --upgrade {shown}")
    jaxlib = machine.versions.get("jaxlib")
    for name, version in machine.versions.items():
        if re.fullmatch(r"jax-cuda\d+-plugin", name) and jaxlib is not None:
            kind = name.split("-")[1]
            if _numbers(version) != _numbers(jaxlib):
                steps.append(
                    f"{name} {version} is not for jaxlib {jaxlib}, so JAX leaves the "
                    f"GPU alone: pip install --upgrade 'jax[{kind}]'"
                )
    return steps


def _hidden(machine: Machine) -> list[str]:
    """What to do about accelerators that JAX does not use."""
    used = {device["platform"] for device in machine.devices}
    platforms = machine.environment.get("JAX_PLATFORMS", "")
    steps = []
    for kind in machine.hardware:
        hardware = _HARDWARE[kind]
        if used & hardware.platforms:
            continue
        here = f"This machine seems to have {hardware.name}, and JAX does not use it."
        if platforms and not hardware.platforms.intersection(platforms.split(",")):
            steps.append(f"{here} JAX_PLATFORMS={platforms} hides it: unset it.")
        elif not any(re.fullmatch(hardware.driver, x) for x in machine.versions):
            steps.append(f"{here} {hardware.install}")
        else:
            steps.append(
                f"{here} This says why: python -c 'import jax; jax.devices(\"{kind}\")'"
            )
    return steps


def _policy(machine: Machine) -> list[str]:
    policies = list(dict.fromkeys(device["policy"] for device in machine.devices))
    steps = []
    for policy in policies:
        where = [d["device"] for d in machine.devices if d["policy"] == policy]
        on = f" on {' and '.join(where)}" if len(policies) > 1 else ""
        if policy == "float32":
            steps.append(_float32(machine, on))
        elif policy == "mixed_float16":
            steps.append(
                f'Train with policy = "mixed_float16"{on}. It needs a loss scale: '
                "jaxmp.loss_scaling(optimizer, policy), or jaxmp.TrainState, which has "
                "one."
            )
        else:
            steps.append(
                f'Train with policy = "{policy}"{on}: jaxmp.autocast(loss_fn, policy), '
                "or jaxmp.apply_policy(model, policy). Its loss scale is 1."
            )
    return steps


def _float32(machine: Machine, on: str) -> str:
    if not all(device["emulated"] for device in machine.devices):
        return (
            f'Train with policy = "float32"{on}: nothing says that half precision is '
            "faster there. If you know better, name the policy yourself."
        )
    return (
        'Train with policy = "float32" here, and test with the policy of the machine '
        'that you will train on: "mixed_bfloat16" for a TPU, or an NVIDIA GPU from '
        'Ampere on; "mixed_float16" for Volta and Turing. "auto" chooses by itself.'
    )


def _commands(machine: Machine) -> list[str]:
    steps = [f"See what stays in float32 in your model: {_ASK.format('audit')}"]
    names = [name for name, there in machine.targets.items() if there]
    if not names:
        steps.append(
            "To know what a step costs on an H100 or a TPU without one, install their "
            "compilers, in an environment of their own since they need one version of "
            "JAX: pip install 'jaxmp[targets]'"
        )
    else:
        ask = f"{_ASK.format('report')} --target {_nearest(machine, names)}"
        steps.append(f"See what a step costs in each precision: {ask}")
    return steps


def _nearest(machine: Machine, names: Sequence[str]) -> str:
    """The target that is most like this machine's devices."""
    known = [chip_of(device["device"]) for device in machine.devices]
    here = {chip.name for chip in known if chip is not None}
    near = [name for name in names if chips[name].name in here]
    if any(device["platform"] == "tpu" for device in machine.devices):
        near += [name for name in names if name.startswith("tpu")]
    return (near or list(names))[0]
