"""What is known of a device, whether it is here, a compile target or in the table."""

from typing import Any, NamedTuple

import jax

from jaxmp.report.compile.chips import Chip, Units, chip_of, chips, units_of
from jaxmp.report.compile.targets import read_target, target_devices


class KnownDevice(NamedTuple):
    """What is known of a device.

    Attributes:
      name: what it is called.
      units: for formats smaller than half; None if unknown.
      chip: its peaks; None if unknown.
    """

    name: str
    units: Units | None
    chip: Chip | None


def known_device(device: Any = None) -> KnownDevice:
    """Looks a device up.

    Args:
      device: a `jax.Device`, the name of a compile target, or of one of `chips`; by
        default the first local device.

    Raises:
      UnknownTarget: for a name that is no target and no chip.
    """
    if isinstance(device, str):
        name = device if device in chips else read_target(device).name
        if chip := chips.get(name):
            return KnownDevice(chip.name.partition(",")[0], chip.units, chip)
        device = target_devices(name)[0]
    device = jax.local_devices()[0] if device is None else device
    kind = device.device_kind
    return KnownDevice(kind, units_of(device), chip_of(kind))
