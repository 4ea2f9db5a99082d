"""What floating formats can represent: `format_range`, read off `jnp.finfo`.

Numbers round to the nearest value, ties to even. A magnitude becomes zero up to half of
the smallest subnormal, and subnormal up to half a step below the smallest normal. It
overflows from half a step above the largest value on. That half step itself rounds up
to infinity in formats that end in an odd significand, and down in float8_e4m3fn, whose
largest value is even because NaN takes the next one.
"""

import functools
import math
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmp.errors import NumericsError


class FormatRange(NamedTuple):
    """The range of a floating format; every number is exact in float64."""

    name: str
    largest: float
    smallest_normal: float
    smallest_subnormal: float
    eps: float
    """Distance from 1 to the next value."""
    becomes_zero: float
    """The largest magnitude that rounds to zero."""
    becomes_normal: float
    """The smallest magnitude that rounds to the smallest normal or above."""
    overflows: float
    """Magnitudes above this one round past the largest value."""
    border_overflows: bool
    """Whether `overflows` itself does too."""

    @property
    def has_range_of_float32(self) -> bool:
        """Whether gradients fit without a loss scale, as in bfloat16."""
        return self.smallest_normal <= 2.0**-126


_ROUNDING = MappingProxyType(
    {"float8_e4m3fn": 0.027, "float8_e5m2": 0.053, "int8": 0.012}
)


def usual_rounding(dtype: DTypeLike) -> float:
    """How far rounding to a small format takes normally distributed numbers.

    Args:
      dtype: a float8 format, or int8, under a scale that is a power of two.

    Returns:
      Norm of the difference over norm of the numbers. Of a float8 format it does not
      depend on the scale; of int8 it is the mean over scales, for rows of 1024.
    """
    return _ROUNDING[jnp.dtype(dtype).name]


@functools.cache
def format_range(dtype: DTypeLike) -> FormatRange:
    """Returns the range of a real floating dtype.

    Args:
      dtype: any dtype with an infinity or a NaN, float8 included.

    Raises:
      NumericsError: if it is not a real floating dtype.
    """
    try:
        dtype = jnp.dtype(dtype)
        info = jnp.finfo(dtype)
    except (TypeError, ValueError):
        info = None
    if info is None or not jnp.issubdtype(dtype, jnp.floating):
        raise NumericsError(
            f"dtype={dtype!r} is not a floating format with a range. Use float16, "
            "bfloat16, float32, float8_e4m3fn or float8_e5m2."
        )
    largest, eps = float(info.max), float(info.eps)
    smallest_subnormal = float(info.smallest_subnormal)
    smallest_normal = float(info.smallest_normal)
    last_place = math.ldexp(eps, math.frexp(largest)[1] - 1)
    return FormatRange(
        name=jnp.dtype(dtype).name,
        largest=largest,
        smallest_normal=smallest_normal,
        smallest_subnormal=smallest_subnormal,
        eps=eps,
        becomes_zero=smallest_subnormal / 2,
        becomes_normal=smallest_normal - smallest_subnormal / 2,
        overflows=largest + last_place / 2,
        border_overflows=largest / last_place % 2 == 1,
    )
