"""Scatters in another dtype than they were traced in.

A scatter holds the function that combines two numbers, as a jaxpr of the dtype that it
was traced in. Another dtype needs another one, which JAX's public function makes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp._jaxpr.types import Eqn

_FUNCTIONS = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter_add": jax.lax.scatter_add,
    "scatter-sub": jax.lax.scatter_sub,
    "scatter_sub": jax.lax.scatter_sub,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter_mul": jax.lax.scatter_mul,
    "scatter-max": jax.lax.scatter_max,
    "scatter_max": jax.lax.scatter_max,
    "scatter-min": jax.lax.scatter_min,
    "scatter_min": jax.lax.scatter_min,
}


def is_retyped_scatter(eqn: Eqn, operands: Sequence[Any]) -> bool:
    """Whether an equation is a scatter into an array of another dtype than traced."""
    if eqn.primitive.name not in _FUNCTIONS:
        return False
    return jnp.result_type(operands[0]) != eqn.invars[0].aval.dtype


def scatter(eqn: Eqn, operands: Sequence[Any]) -> Any:
    """Scatters as the equation does, in the dtype of the operands."""
    params = eqn.params
    return _FUNCTIONS[eqn.primitive.name](
        *operands,
        dimension_numbers=params["dimension_numbers"],
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
    )
