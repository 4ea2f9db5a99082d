"""Multiplying trees by a loss scale, and dividing them by it again."""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.fp8_metadata import overwritten

T = TypeVar("T")

# The cotangent of a float16 loss is the scale itself, in float16. 2^15 is the largest
# power of two that is finite there.
LARGEST_FLOAT16_SCALE = 2.0**15


def scale_tree(tree: T, scale: Any) -> T:
    """Multiplies the floating and complex leaves by `scale`, in float32 at least."""
    return jax.tree.map(lambda x: _apply(operator.mul, x, scale), tree)


def unscale_tree(tree: T, scale: Any) -> T:
    """Divides the floating and complex leaves by `scale`, in float32 at least.

    float16 and bfloat16 leaves come out as float32, wider ones keep their dtype;
    integers, float0, keys and FP8 metadata pass unchanged.
    """

    # A division, not a product with the reciprocal: XLA on the CPU repeats a cheap
    # product, and the rounding to float16 before it, in everything that reads it, and
    # the step took a third longer. On TPUs and GPUs both cost the same traffic.
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure,
        [
            x if is_metadata else _apply(operator.truediv, x, scale)
            for x, is_metadata in zip(leaves, overwritten(tree), strict=True)
        ],
    )


def _apply(operation: Callable[[Any, Any], Any], x: Any, scale: Any) -> Any:
    x = jnp.asarray(x) if isinstance(x, (float, complex)) else x
    if not _tree.is_inexact(x) or jnp.finfo(x.dtype).bits < 16:
        return x
    wide = jnp.asarray(_tree.at_least_float32(x))
    scale = jnp.asarray(scale, wide.real.dtype)
    if jnp.iscomplexobj(wide):
        # Part by part: the formula for complex numbers would turn an infinity into NaN.
        return jax.lax.complex(operation(wide.real, scale), operation(wide.imag, scale))
    return operation(wide, scale)
