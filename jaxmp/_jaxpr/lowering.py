"""What JAX knows when it turns a jaxpr into a program for a compiler."""

import math
from typing import Any

import jax

lowering_for = jax.make_user_context(default_value="")
"""`with lowering_for(kind):` says what kind of device is lowered for, elsewhere.

JAX lowers again what it has lowered for another kind.
"""


def device_count(context: Any) -> int:
    """Over how many devices a compiler will divide what is lowered.

    Where a program is written for one device of many, inside a `shard_map` over all
    axes or a `pmap`, it is one.

    Args:
      context: the `LoweringRuleContext` that a lowering rule gets.
    """
    around = context.module_context.axis_context
    if hasattr(around, "num_devices"):
        return around.num_devices
    mesh = getattr(around, "mesh", None)
    if mesh is None:
        return 1
    manual = getattr(around, "manual_axes", frozenset())
    return math.prod(n for axis, n in mesh.shape.items() if axis not in manual)


def device_kind(context: Any) -> str:
    """What kind of device a program is lowered for, such as `"TPU v6 lite"`.

    Empty where a program is lowered for a machine elsewhere, unless `lowering_for` says
    which.

    Args:
      context: the `LoweringRuleContext` that a lowering rule gets.
    """
    if lowering_for.value:
        return lowering_for.value
    try:
        backend = context.module_context.get_backend(optional=True)
    except RuntimeError:  # No such machine is here.
        return ""
    return "" if backend is None else backend.devices()[0].device_kind
