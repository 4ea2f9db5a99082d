"""A value that is made of a copy in half, and has its gradient in what is stored."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxmp._jaxpr.types import Array


def of_stored(
    value: Callable[..., Array],
    tangent: Callable[..., Array],
    half: Array,
    stored: Array,
    *rest: Array,
) -> Array:
    """`value(half, stored, *rest)`, in half.

    Args:
      value: makes it.
      tangent: a function `(tangent of stored, stored, *rest)`, linear in the first, in
        the dtype of `stored`.
      half: the copy in half, which gets no gradient.
      stored: what is stored, which gets it.
      rest: operands without one.
    """
    dtype = jnp.result_type(half)

    @jax.custom_jvp
    def run(half: Array, stored: Array, *rest: Array) -> Array:
        return value(half, stored, *rest)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        result = run(*primals)
        if isinstance(tangents[1], SymbolicZero):
            return result, jnp.zeros_like(result)
        return result, tangent(tangents[1], *primals[1:]).astype(dtype)

    return run(half, stored, *rest)
