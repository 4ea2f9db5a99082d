"""Operands that an operation repeats along an axis, as `x + bias` does.

The gradient of such an operand is a sum over that axis, and devices add it up in the
dtype of the sum. JAX sums in the dtype of the operand. So it is repeated in float32
first: the values are the same, and compilers repeat nothing in memory.
"""

from typing import Any

import jax

from jaxmp._jaxpr.meshes import explicit_sharding
from jaxmp._jaxpr.types import Array
from jaxmp.casting.plan.states import FLOAT32


def repeated(x: Array, like: Any, dtype: Any) -> jax.Array:
    """Repeats an operand in half, so that its gradient is added up in float32.

    Args:
      x: the operand as it is stored: in half, or a weight in float32.
      like: the abstract value whose shape it gets.
      dtype: the half dtype that it is read in.
    """
    wide = jax.lax.convert_element_type(x, FLOAT32)
    axes = tuple(range(len(like.shape)))
    sharding = explicit_sharding(like)
    wide = jax.lax.broadcast_in_dim(wide, like.shape, axes, out_sharding=sharding)
    return jax.lax.convert_element_type(wide, dtype)
