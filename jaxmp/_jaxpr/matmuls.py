"""The matmuls of a finished program: what they multiply, and what was quantised.

x ----> quantize ----> values, scales --+
                                        +--> scaled_dot --> x @ w
w ----> quantize ----> values, scales --+
"""

from typing import Any

from jaxmp._jaxpr.calls import BODY, CUSTOM_JVPS, function_name
from jaxmp._jaxpr.primitives import MATMUL_OF_TANGENT, SCALED_DOT
from jaxmp._jaxpr.types import Eqn
from jaxmp._jaxpr.versions import open_jaxpr

QUANTIZE = "quantize"
"""What rounds an array to a small format, under scales."""


def operands(eqn: Eqn) -> tuple[Any, Any]:
    """The left and the right array of a matmul, in the dtypes that are multiplied.

    Args:
      eqn: an equation of one of the primitives in `ALL_MATMULS`.

    Returns:
      Their abstract values.
    """
    avals = [v.aval for v in eqn.invars]
    if eqn.primitive.name == SCALED_DOT:
        return avals[0], avals[2]
    if eqn.primitive.name == MATMUL_OF_TANGENT:
        half = eqn.params["half"]
        other, tangent = (x.update(dtype=half) for x in (avals[0], avals[-1]))
        is_left = eqn.params["position"] == 0
        return (tangent, other) if is_left else (other, tangent)
    return avals[0], avals[1]


def dimension_numbers(eqn: Eqn) -> Any:
    """What a matmul contracts and batches, as `jax.lax.dot_general` takes it."""
    if eqn.primitive.name == MATMUL_OF_TANGENT:
        return eqn.params["matmul"].dimension_numbers
    return eqn.params["dimension_numbers"]


def is_quantize(eqn: Eqn) -> bool:
    """Whether a call rounds an array to a small format: to values and their scales.

    The array is its last operand. In a loop, JAX may pass constants before it.
    """
    name = eqn.primitive.name
    if name not in CUSTOM_JVPS or len(eqn.outvars) != 2:
        return False
    values, _ = eqn.outvars
    is_named = function_name(eqn.params[BODY[name]]) == QUANTIZE
    return is_named and values.aval.dtype.itemsize == 1


def is_quantized_matmul(eqn: Eqn) -> bool:
    """Whether a call quantises two operands and multiplies them."""
    name = eqn.primitive.name
    if name not in CUSTOM_JVPS:
        return False
    inside = open_jaxpr(eqn.params[BODY[name]]).eqns
    return any(inner.primitive.name == SCALED_DOT for inner in inside)
