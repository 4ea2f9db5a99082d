"""Rounding to a small format under a scale, in the form that each compiler needs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.types import Array

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

Axes = tuple[int, ...]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def round_to_format(
    x: Array, dtype: np.dtype, axes: Axes, is_weight: bool
) -> tuple[Array, Array]:
    """The values of `Quantized`, and the inverses of their scales.

    It runs under jit, so that equal arrays are traced and lowered once.

    Args:
      x: an array in half.
      dtype: float8 or int8.
      axes: what shares a scale.
      is_weight: whether it is a weight, which is usually cast to half for this.
    """
    if not x.size:
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        return x.astype(dtype), jnp.ones(shape, jnp.float32)
    settings = {"dtype": dtype, "axes": axes}
    return jax.lax.platform_dependent(
        x,
        cpu=functools.partial(_on_cpu, **settings),
        cuda=functools.partial(_on_gpu, is_weight=is_weight, **settings),
        default=functools.partial(_in_one_step, **settings),
    )


def _in_one_step(x: Array, dtype: np.dtype, axes: Axes) -> tuple[Array, Array]:
    """As TPUs need it: the maximum is found by the matmul that makes the array."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    inverse = inverse_scale(largest, dtype)
    return _rounded(x.astype(jnp.float32) * reciprocal(inverse), dtype), inverse


def _on_cpu(x: Array, dtype: np.dtype, axes: Axes) -> tuple[Array, Array]:
    # XLA forgets roundings to half in what it fuses: the barrier keeps it from that.
    wide = jax.lax.optimization_barrier(x).astype(jnp.float32)
    inverse = inverse_scale(_largest_by_bits(wide, axes), dtype)
    return _rounded(wide * reciprocal(inverse), dtype), inverse


def _on_gpu(
    x: Array, dtype: np.dtype, axes: Axes, is_weight: bool
) -> tuple[Array, Array]:
    # Activations are stored in half, so that the barrier costs nothing. A weight is
    # rounded again instead of being stored in half for this.
    is_cast_again = is_weight and x.dtype == jnp.bfloat16
    wide = (x if is_cast_again else jax.lax.optimization_barrier(x)).astype(jnp.float32)
    first = _first_step(x.shape, axes)
    largest = jnp.max(jnp.abs(wide), axis=first, keepdims=True)
    if is_cast_again:
        wide, largest = map(_round_to_bfloat16, (wide, largest))
    inverse = inverse_scale(largest, dtype)
    scale = reciprocal(inverse)
    if first != axes:
        inverse = jnp.max(inverse, axis=axes, keepdims=True)
        scale = jnp.min(scale, axis=axes, keepdims=True)
    return _rounded(wide * scale, dtype), inverse


def _rounded(scaled: Array, dtype: np.dtype) -> Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        scaled = jax.lax.round(scaled, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return scaled.astype(dtype)


def _largest_by_bits(x: Array, axes: Axes) -> Array:
    """The largest magnitude, NaN if there is one.

    XLA's maximum of many numbers passes over NaN on CPUs. Of the bits, those of NaN are
    the largest.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return _from_bits(jnp.max(bits, axis=axes, keepdims=True))


def _first_step(shape: tuple[int, ...], axes: Axes) -> Axes:
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
