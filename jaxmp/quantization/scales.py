"""Scales: powers of two that bring an array into the range of a small format.

A power of two changes no digit, so that scaling costs no accuracy, commutes with every
rounding, and a gradient of 2^k times a loss has the digits of the gradient of the loss.
"""

import functools
import math
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

_LONG = 2**14
_SHORT = 2**11
"""Of more numbers than the one XLA finds the largest in two kernels on GPUs, of no more
than the other in one."""

_MANTISSA = 0x7FFFFF
_ONE = 0x3F800000
"""float32: the bits of its mantissa, and those of 1."""


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


def inverse_scale(largest: Array, dtype: np.dtype) -> Array:
    """The smallest powers of two over which arrays are within a format.

    Args:
      largest: their largest magnitudes, float32.
      dtype: the format.

    Returns:
      float32: `largest / inverse` is at most the largest number of the format, and more
      than half of it, if `largest` is not smaller than 2^-100. NaN where `largest` is
      not finite.
    """
    limit = int(np.float32(_largest(dtype)).view(np.int32))
    bits = jax.lax.bitcast_convert_type(jnp.maximum(largest, _SMALLEST), jnp.int32)
    # A mantissa above that of the limit carries into the exponent.
    bits = (bits + (_MANTISSA - (limit & _MANTISSA))) & (0xFF << 23)
    return _from_bits(bits - (limit & ~_MANTISSA) + _ONE) + 0 * largest


def _largest(dtype: np.dtype) -> float:
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return float(jnp.finfo(dtype).max) if is_float else float(jnp.iinfo(dtype).max)


def reciprocal(power: Array) -> Array:
    """1 over a power of two, float32, of which neither is subnormal."""
    return _from_bits(2 * _ONE - jax.lax.bitcast_convert_type(power, jnp.int32))


def _from_bits(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def quantize(
    x: Array,
    dtype: np.dtype,
    axes: tuple[int, ...] | None,
    is_weight: bool = False,
) -> Quantized:
    """Rounds an array to a small format, under scales that are powers of two.

    Args:
      x: an array in half.
      dtype: float8 or int8.
      axes: what shares a scale; None is the whole array.
      is_weight: whether it is a weight, which is usually cast to half for this.

    Returns:
      The values, rounded to nearest even, and the inverses of the scales.

    Raises:
      NoSecondDerivative: if it is differentiated.
    """
    return _round(x, dtype, axes, is_weight)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round(
    x: Array, dtype: np.dtype, axes: tuple[int, ...] | None, is_weight: bool
) -> Quantized:
    # Under jit, so that equal arrays are traced and lowered once. XLA forgets roundings
    # to half in what it fuses. The barrier keeps it from that, and activations are
    # stored in half. A weight is rounded again instead, which stores nothing.
    is_cast_again = is_weight and x.dtype == jnp.bfloat16
    wide = (x if is_cast_again else jax.lax.optimization_barrier(x)).astype(jnp.float32)
    axes = tuple(range(x.ndim)) if axes is None else axes
    first = _first_step(x.shape, axes)
    largest = _largest_magnitude(wide, first)
    if is_cast_again:
        wide, largest = map(_round_to_bfloat16, (wide, largest))
    inverse = inverse_scale(largest, dtype)
    scale = reciprocal(inverse)
    if first != axes:
        inverse = _largest_magnitude(inverse, axes)
        scale = jnp.min(scale, axis=axes, keepdims=True)
    scaled = wide * scale
    if not jnp.issubdtype(dtype, jnp.floating):
        scaled = jax.lax.round(scaled, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return Quantized(scaled.astype(dtype), inverse)


def _largest_magnitude(x: Array, axes: tuple[int, ...]) -> Array:
    """The largest magnitude, NaN if there is one."""

    def by_value(x: Array) -> Array:
        return jnp.max(jnp.abs(x), axis=axes, keepdims=True)

    def by_bits(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
        return _from_bits(jnp.max(bits, axis=axes, keepdims=True))

    # XLA's maximum of many numbers passes over NaN on CPUs. Of the bits, those of NaN
    # are the largest.
    return jax.lax.platform_dependent(x, cpu=by_bits, default=by_value)


def _first_step(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Over which axes a maximum is found first: all, or a few numbers are left.

    GPUs find the maximum of a long array in two steps anyway. What is made of it
    between the two needs no kernel of its own, which would work on a single number.
    """
    shared = math.prod(shape[i] for i in axes)
    scales = math.prod(shape) // max(shared, 1)
    if shared <= _LONG:
        return axes
    short = [i for i in axes if scales * shape[i] <= _SHORT]
    # Rows are read faster than columns.
    kept = max(short, key=lambda i: (i != len(shape) - 1, shape[i]), default=None)
    return tuple(i for i in axes if i != kept)


def _round_to_bfloat16(x: Array) -> Array:
    """Rounds float32, and leaves it float32."""
    half = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(x, half.nexp, half.nmant)


@quantize.defjvp
def _no_derivative(
    dtype: np.dtype,
    axes: Any,
    is_weight: bool,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> Any:
    del axes, is_weight, primals, tangents
    raise NoSecondDerivative(
        f"A matmul in {dtype.name} was differentiated twice, as by jax.hessian, or by "
        "a gradient of a gradient. Its derivative is made of rounded operands, which "
        "have no derivative. Compute this part under a half policy, such as "
        "jaxmp.autocast(fn, 'mixed_bfloat16'), or keep its matmuls in half by a rule: "
        "OpRule(path=..., quantize='none')."
    )
