"""Multiplying by a loss scale and dividing by it again, leaf by leaf."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxmp import _tree

T = TypeVar("T")

# A gradient of this collection is the new value of an FP8 scale or history, which Flax
# passes in place of a gradient (flax/linen/fp8_ops.py); it never was scaled.
OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"


def scale_tree(tree: T, scale: Any) -> T:
    """Multiplies the floating and complex leaves by `scale`, in float32 at least."""
    return jax.tree.map(lambda x: _times(x, scale), tree)


def unscale_tree(tree: T, scale: Any) -> T:
    """Divides the floating and complex leaves by `scale`, in float32 at least.

    float16 and bfloat16 leaves come out as float32, wider ones keep their dtype;
    integers, float0, keys and FP8 metadata pass unchanged.
    """
    inverse = 1 / jnp.asarray(scale, jnp.float32)

    def unscale(path, x):
        if any(getattr(key, "key", None) == OVERWRITE_WITH_GRADIENT for key in path):
            return x
        return _times(x, inverse)

    return jax.tree_util.tree_map_with_path(unscale, tree)


def _times(x: Any, factor: Any) -> Any:
    x = jnp.asarray(x) if isinstance(x, (float, complex)) else x
    if not _tree.is_inexact(x) or jnp.finfo(x.dtype).bits == 8:
        return x
    wide = jnp.asarray(_tree.at_least_float32(x))
    return wide * jnp.asarray(factor, wide.dtype)
