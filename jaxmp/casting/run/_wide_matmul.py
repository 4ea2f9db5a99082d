"""Matmuls of half operands that return float32: those that make gradients of weights.

Their own derivatives are matmuls of half operands again. JAX would multiply a float32
cotangent by a half operand there, and compilers would multiply in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive

from jaxmp._jaxpr.types import Array
from jaxmp.casting.plan.states import FLOAT32
from jaxmp.casting.run._barriers import cpu_barrier


def multiply_wide(
    matmul: Primitive, params: Mapping[str, Any], operands: Sequence[Array]
) -> Array:
    """The float32 result of a matmul or convolution of half operands.

    Args:
      matmul: its primitive.
      params: its parameters.
      operands: in half; behind the first two, what has no gradient.
    """
    needs_barriers = jnp.result_type(operands[0]) == jnp.bfloat16
    guard = cpu_barrier if needs_barriers else _as_it_is
    dtype = jnp.result_type(operands[0])

    @jax.custom_jvp
    def matmul_in_float32(*operands: Array) -> Array:
        first, second, *rest = operands
        wide = {**params, "preferred_element_type": FLOAT32}
        return guard(matmul.bind(guard(first), guard(second), *rest, **wide))

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        out, half = matmul_in_float32(*primals), {**params}
        half["preferred_element_type"] = dtype
        terms = []
        for i in (0, 1):
            if not isinstance(tangents[i], SymbolicZero):
                terms.append(matmul.bind(*_put(primals, i, tangents[i]), **half))
        if not terms:
            return out, jnp.zeros_like(out)
        return out, sum(terms[1:], terms[0]).astype(FLOAT32)

    matmul_in_float32.defjvp(derivative, symbolic_zeros=True)
    return matmul_in_float32(*operands)


def _put(values: Sequence[Array], position: int, value: Array) -> list[Array]:
    return [value if i == position else x for i, x in enumerate(values)]


def _as_it_is(x: jax.Array) -> jax.Array:
    return x
