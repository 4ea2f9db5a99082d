"""Which arrays hold a NaN or an infinity."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.types import Arrays

What: TypeAlias = Literal["NaN", "Inf"]
_WHAT: tuple[What | None, ...] = (None, "Inf", "NaN")


def nonfinite(values: Arrays) -> list[What | None]:
    """`"NaN"`, `"Inf"` or None for each array."""
    is_inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in values]
    floats = [x for x, is_float in zip(values, is_inexact, strict=True) if is_float]
    codes = iter(np.asarray(_codes(floats)).tolist() if floats else ())
    return [_WHAT[next(codes)] if is_float else None for is_float in is_inexact]


@jax.jit
def _codes(values: list[jax.Array]) -> jax.Array:
    """The places of arrays in `_WHAT`."""
    return jnp.stack(
        [
            jnp.where(jnp.any(jnp.isnan(x)), 2, jnp.where(jnp.isfinite(x).all(), 0, 1))
            for x in values
        ]
    )
