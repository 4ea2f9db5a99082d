"""Whether a loss was float16 somewhere on its way, where its cotangent is the scale.

A scale of 2^16 is infinite in float16. A loss function that computes its loss in a
float16 model and returns it as float32 gets that infinity as its very first cotangent.
JAX records the tangent of a loss while it differentiates; the record is followed
backwards, through what hands a cotangent on as it is. What is not certain to be
infinite is left alone, and so is everything where JAX keeps no such record.
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
    """Tells whether the scale itself becomes a cotangent of dtype float16.

    Args:
      loss: what a loss function returned while it is differentiated.

    Returns:
      True if the loss, or something that it is a sum of, is or was float16.
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
