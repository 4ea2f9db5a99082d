"""Whether a loss was float16 where its cotangent is still the loss scale itself.

A scale of 2^16 is infinite in float16. A loss that is computed in a float16 model and
returned as float32 gets that infinity as its very first float16 cotangent. While JAX
differentiates, it records the tangent of the loss. The record is followed backwards
through operations that pass a cotangent on unchanged. Only losses that are certain to
overflow count, and none where JAX keeps no such record.
"""

from typing import Any

import jax.numpy as jnp

from jaxmp._jaxpr.tracers import Recorded, recorded, recorded_tangent

# The transpose of each of these gives every operand the cotangent of the result.
_HANDS_ON = frozenset(
    (
        "add",
        "add_any",
        "sub",
        "neg",
        "copy",
        "reshape",
        "squeeze",
        "transpose",
        "reduce_sum",
        "convert_element_type",
        "reduce_precision",
        "optimization_barrier",
    )
)
_MOST_STEPS = 10_000


def was_float16(loss: Any) -> bool:
    """Returns whether the scale itself becomes a cotangent of dtype float16.

    Args:
      loss: result of a loss function that is being differentiated.

    Returns:
      True if the loss, or a value that it is a sum of, is or was float16.
    """
    if jnp.result_type(loss) == jnp.float16:
        return True
    tangent = recorded_tangent(loss)
    return tangent is not None and _reaches_float16(tangent)


def _reaches_float16(tangent: Any) -> bool:
    waiting, seen = [tangent], set()
    while waiting and len(seen) < _MOST_STEPS:
        value = waiting.pop()
        if getattr(value.aval, "dtype", None) == jnp.float16:
            return True
        if id(value) in seen:
            continue
        seen.add(id(value))
        equation: Recorded | None = recorded(value)
        if equation is not None and equation.name in _HANDS_ON:
            waiting += equation.inputs
    return False
