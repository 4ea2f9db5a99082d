"""What JAX knows when it turns a jaxpr into a program for a compiler."""

import math
from typing import Any


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
