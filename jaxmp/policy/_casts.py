"""`cast_to_full` and `cast_to_half`: jmp's casts that need no policy."""

from typing import TypeVar

import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.policy.dtypes import half_dtype

T = TypeVar("T")


def cast_to_full(tree: T) -> T:
    """Casts the floating leaves of a tree to float32.

    Args:
      tree: any pytree; `Policy.cast_to_param` says which leaves are cast.

    Returns:
      The tree with its floating leaves in float32.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> jaxmp.cast_to_full(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    return _tree.cast_floating(tree, jnp.float32)


def cast_to_half(tree: T) -> T:
    """Casts the floating leaves of a tree to the device's half-precision dtype.

    Args:
      tree: any pytree; `Policy.cast_to_param` says which leaves are cast.

    Returns:
      The tree with its floating leaves in `half_dtype()`.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> jaxmp.cast_to_half(jnp.ones(2)).dtype.itemsize
      2
    """
    return _tree.cast_floating(tree, half_dtype())
