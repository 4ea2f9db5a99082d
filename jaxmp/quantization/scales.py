"""Scales: powers of two that bring an array into the range of a small format.

A power of two changes no digit, so that scaling costs no accuracy, commutes with every
rounding, and a gradient of 2^k times a loss has the digits of the gradient of the loss.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.types import Array
from jaxmp.errors import NoSecondDerivative

_SMALLEST = 2.0**-100
"""Arrays whose largest number is smaller are scaled like this one: the inverse of a
scale, and its product with any result of a matmul, is then no subnormal."""


class Quantized(NamedTuple):
    """An array in a small format.

    Attributes:
      values: the array over its scale, float8 or int8.
      inverse: float32 powers of two, `values * inverse` is the array: of length 1 along
        every axis that shares one. NaN where a number that shares it is not finite.
    """

    values: Array
    inverse: Array

    def in_dtype(self, dtype: Any) -> Array:
        """The array again, as it was rounded."""
        return (self.values.astype(jnp.float32) * self.inverse).astype(dtype)


def scale_exponent(largest: Array, dtype: np.dtype) -> Array:
    """The exponents of the largest powers of two that keep arrays within a format.

    Args:
      largest: their largest magnitudes, float32, finite.
      dtype: the format.

    Returns:
      int32 exponents: `largest * 2.0**exponent` is at most the largest number of the
      format, and more than half of it, if it is not smaller than 2^-100.
    """
    limit = np.float32(_largest(dtype))
    mantissa, exponent = np.frexp(limit)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(largest, _SMALLEST), jnp.int32)
    is_above = (bits & 0x7FFFFF) > (int(mantissa * 2**24) & 0x7FFFFF)
    return int(exponent) - 1 - ((bits >> 23) - 127) - is_above.astype(jnp.int32)


def _largest(dtype: np.dtype) -> float:
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return float(jnp.finfo(dtype).max) if is_float else float(jnp.iinfo(dtype).max)


def power_of_two(exponent: Array) -> Array:
    """2^exponent in float32, for int32 exponents of normal numbers."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def quantize(x: Array, dtype: np.dtype, axes: tuple[int, ...] | None) -> Quantized:
    """Rounds an array to a small format, under scales that are powers of two.

    Args:
      x: a floating array.
      dtype: float8 or int8.
      axes: what shares a scale; None is the whole array.

    Returns:
      The values, rounded to nearest even, and the inverses of the scales.

    Raises:
      NoSecondDerivative: if it is differentiated.
    """
    return _round(x, dtype, axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _round(x: Array, dtype: np.dtype, axes: tuple[int, ...] | None) -> Quantized:
    # Under jit, so that equal arrays are traced and lowered once.
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    exponent = scale_exponent(largest, dtype)
    scaled = x.astype(jnp.float32) * power_of_two(exponent)
    if not jnp.issubdtype(dtype, jnp.floating):
        scaled = jax.lax.round(scaled, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    inverse = jnp.where(
        jnp.isfinite(largest), power_of_two(-exponent), jnp.float32(np.nan)
    )
    return Quantized(scaled.astype(dtype), inverse)


@quantize.defjvp
def _no_derivative(
    dtype: np.dtype, axes: Any, primals: Sequence[Any], tangents: Sequence[Any]
) -> Any:
    del axes, primals, tangents
    raise NoSecondDerivative(
        f"A matmul in {dtype.name} was differentiated twice, as by jax.hessian, or by a "
        "gradient of a gradient. Its derivative is made of rounded operands, which have "
        "no derivative. Compute this part under a half policy, such as "
        "jaxmp.autocast(fn, 'mixed_bfloat16'), or keep its matmuls in half by a rule: "
        "OpRule(path=..., quantize='none')."
    )
