"""Multiplying by a loss scale and dividing by it again, leaf by leaf."""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.flax_internals import OVERWRITE_WITH_GRADIENT

T = TypeVar("T")

# The cotangent of a float16 loss is the scale itself, in float16: 2^16 is infinite
# there, and 2^15 is the largest power of two that is not.
LARGEST_FLOAT16_SCALE = 2.0**15


def scale_tree(tree: T, scale: Any) -> T:
    """Multiplies the floating and complex leaves by `scale`, in float32 at least."""
    return jax.tree.map(lambda x: _apply(operator.mul, x, scale), tree)


def unscale_tree(tree: T, scale: Any) -> T:
    """Divides the floating and complex leaves by `scale`, in float32 at least.

    float16 and bfloat16 leaves come out as float32, wider ones keep their dtype;
    integers, float0, keys and FP8 metadata pass unchanged.
    """

    # A division, not a product with the reciprocal: XLA on the CPU computes a cheap
    # product anew in everything that reads it, the rounding to float16 before it too,
    # and the step took a third longer. On TPUs and GPUs both compile to one traffic.
    def unscale(path, x):
        # The new FP8 scale that stands for a gradient never was scaled.
        if any(getattr(key, "key", None) == OVERWRITE_WITH_GRADIENT for key in path):
            return x
        return _apply(operator.truediv, x, scale)

    return jax.tree_util.tree_map_with_path(unscale, tree)


def _apply(operation: Callable[[Any, Any], Any], x: Any, scale: Any) -> Any:
    x = jnp.asarray(x) if isinstance(x, (float, complex)) else x
    if not _tree.is_inexact(x) or jnp.finfo(x.dtype).bits < 16:
        return x
    wide = jnp.asarray(_tree.at_least_float32(x))
    scale = jnp.asarray(scale, wide.real.dtype)
    if jnp.iscomplexobj(wide):
        # Part by part: the formula for complex numbers would make NaN of an infinity.
        return jax.lax.complex(operation(wide.real, scale), operation(wide.imag, scale))
    return operation(wide, scale)
