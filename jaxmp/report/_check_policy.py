"""`check_policy`: whether a device multiplies what a policy quantises to."""

from typing import Any

from jaxmp.policy import PolicyLike, get_policy
from jaxmp.report.compile.chips import format_of
from jaxmp.report.compile.known_devices import known_device

_PRESETS = {"float8": "mixed_fp8", "int8": "mixed_int8"}


def check_policy(policy: PolicyLike, device: Any = None) -> str:
    """Says if a device does not multiply the format that a policy quantises to.

    A device without units for float8 or int8 still runs `"mixed_fp8"` or
    `"mixed_int8"`: it converts the operands, and multiplies them in half.

    Args:
      policy: anything that `jaxmp.get_policy` takes.
      device: a `jax.Device`, the name of a compile target, or one of
        `jaxmp.report.chips`; by default the first local device.

    Returns:
      One line with a better policy, if there is one; empty if the device has units for
      the format, and for a policy that quantises nothing.

    Raises:
      PolicyError: for a policy that cannot be read.
      UnknownTarget: for a name that is no target and no chip.

    Example:
      >>> from jaxmp.report import check_policy
      >>> check_policy("mixed_fp8", "tpu-v4")
      'TPU v4 does not multiply float8: mixed_fp8 saves bytes and no time.'
      >>> check_policy("mixed_int8", "tpu-v5e")
      ''
    """
    quantize = get_policy(policy).quantize
    if quantize is None:
        return ""
    name, units, _ = known_device(device)
    wanted = format_of(quantize)
    if units is None:
        return f"It is unknown whether {name} multiplies {wanted}."
    if wanted in units.formats:
        return ""
    found = f"{name} does not multiply {wanted}: mixed_{quantize}"
    others = [preset for x, preset in _PRESETS.items() if x in units.formats]
    repair = f"; write {others[0]}" if others else ""
    return f"{found} saves bytes and no time{repair}."
