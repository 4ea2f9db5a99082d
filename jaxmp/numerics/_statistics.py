"""`statistics`: what range the numbers of a tree take, and what a dtype would lose.

Every count comes from the bits of the numbers, as integers. CPUs and TPUs treat
float32 numbers below 2^-126 as zero in arithmetic; here they are what they are. The
borders between zero, subnormal, normal and overflow are those of rounding to nearest.

    one leaf  ->  magnitude bits  ->  counts, largest, smallest   (integer comparisons)
                                  ->  exponents                   (a histogram)

All of it reduces the same array, which XLA for TPU and GPU reads once.

Sharp edges
- Counts are int32: a leaf holds at most 2^31 - 1 numbers.
- `mean` is float32 arithmetic: what is below 2^-126 counts as zero in it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmp import _tree
from jaxmp.numerics._formats import format_range

EXPONENTS = range(-149, 128)
"""The exponents that `Statistics.exponents` counts: all of float32's."""

_FLOATS = {4: np.float32, 8: np.float64}
_INTEGERS = {4: np.int32, 8: np.int64}
_LARGE = np.float32(2.0**64)


class Statistics(NamedTuple):
    """What range the numbers of one array take; `size` counts all of them."""

    amax: jax.Array
    """float32: the largest finite magnitude, 0 if there is none."""
    smallest: jax.Array
    """float32: the smallest finite magnitude that is not zero, 0 if there is none."""
    mean: jax.Array
    """float32: the mean magnitude of the finite numbers."""
    size: jax.Array
    """int32: how many numbers there are; a complex number is two."""
    zeros: jax.Array
    """int32: how many are zero."""
    underflows: jax.Array
    """int32: how many are not zero and would be in the dtype that was asked about."""
    subnormals: jax.Array
    """int32: how many would be subnormal in it, and lose digits."""
    overflows: jax.Array
    """int32: how many are finite and would not be in it."""
    nonfinite: jax.Array
    """int32: how many are infinite or NaN."""
    exponents: jax.Array
    """int32 [277]: how many have the exponent e, that is 2^e <= |x| < 2^(e+1), for
    each e of `EXPONENTS`. float64 numbers beyond these count at the ends."""

    def fraction(self, count: str) -> jax.Array:
        """The share of the numbers that one of the counts is about, as float32."""
        size = jnp.maximum(jnp.asarray(self.size), 1).astype(jnp.float32)
        return jnp.asarray(getattr(self, count)).astype(jnp.float32) / size


def statistics(tree: Any, dtype: Any = None) -> dict[str, Statistics]:
    """Tells what range the numbers of each array take, and what a dtype would lose.

    Works in compiled functions. Whatever the dtype of an array, it is looked at in
    float32, or in float64 if it is that.

    Args:
      tree: pytree of arrays of any floating or complex dtype. Integers, booleans and
        keys have no range to lose and are left out.
      dtype: the floating dtype in which underflow and overflow are asked about; each
        array's own by default.

    Returns:
      A dictionary from the path of each array, such as `"block_0/dense/kernel"`, to
      its `Statistics`.

    Raises:
      NumericsError: if `dtype` is no floating dtype.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018, section 3.2
      (https://arxiv.org/abs/1710.03740), counts gradients by exponent.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import statistics
      >>> grads = {"w": jnp.array([0.0, 1e-9, 1e-6, 0.5, 1e5, jnp.inf])}
      >>> w = statistics(grads, "float16")["w"]
      >>> int(w.zeros), int(w.underflows), int(w.subnormals), int(w.overflows)
      (1, 1, 1, 1)
      >>> print(w.amax, w.smallest, w.nonfinite, f"{w.fraction('underflows'):.3f}")
      100000.0 1e-09 1 0.167
    """
    if dtype is not None:
        format_range(dtype)
    return {
        _tree.path_string(path): leaf_statistics(x, dtype)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if has_range(x)
    }


def has_range(x: Any) -> bool:
    """Whether `statistics` looks at a leaf."""
    return _tree.is_inexact(x) or isinstance(x, (float, complex))


def leaf_statistics(x: Any, dtype: Any = None) -> Statistics:
    """The statistics of one array."""
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    target = format_range(x.dtype if dtype is None else dtype)
    bits, read_as = _magnitude_bits(x)

    def border(value):
        # A border below the smallest number or above the largest is 0 or infinity.
        with np.errstate(over="ignore", under="ignore"):
            return read_as(value).view(_INTEGERS[read_as().itemsize])

    infinity, zero = border(np.inf), border(0.0)
    first_overflow = border(target.overflows) + (not target.border_overflows)
    is_finite, is_zero = bits < infinity, bits == zero
    is_lost = ~is_zero & (bits <= border(target.becomes_zero))
    is_below_normal = ~is_zero & (bits < border(target.becomes_normal))
    finite_bits = jnp.where(is_finite, bits, zero)
    smallest = jnp.min(jnp.where(is_zero, infinity, bits), initial=infinity)
    return Statistics(
        amax=_as_float32(jnp.max(finite_bits, initial=zero), read_as),
        smallest=_as_float32(jnp.where(smallest == infinity, zero, smallest), read_as),
        mean=_mean(_as_float32(finite_bits, read_as), _count(is_finite)),
        size=jnp.full((), x.size, jnp.int32),
        zeros=_count(is_zero),
        underflows=_count(is_lost),
        subnormals=_count(is_below_normal & ~is_lost),
        overflows=_count(is_finite & (bits >= first_overflow)),
        nonfinite=_count(~is_finite),
        exponents=_histogram(_exponent_index(bits, read_as, is_finite & ~is_zero)),
    )


def _magnitude_bits(x: jax.Array) -> tuple[jax.Array, Any]:
    """The bits of |x| as signed integers, which are in the order of the magnitudes."""
    read_as = _FLOATS[max(x.dtype.itemsize, 4)]
    integer = _INTEGERS[read_as().itemsize]
    bits = lax.bitcast_convert_type(x.astype(read_as), integer)
    return bits & np.iinfo(integer).max, read_as


def _as_float32(bits: jax.Array, read_as: Any) -> jax.Array:
    x = lax.bitcast_convert_type(bits, read_as)
    if read_as is np.float64:
        # What is finite stays finite.
        x = jnp.minimum(x, read_as(np.finfo(np.float32).max))
    return x.astype(jnp.float32)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _mean(magnitudes: jax.Array, count: jax.Array) -> jax.Array:
    # Two sums, since one of large numbers could overflow.
    is_large = magnitudes >= _LARGE
    small = jnp.sum(jnp.where(is_large, np.float32(0), magnitudes))
    large = jnp.sum(jnp.where(is_large, magnitudes / _LARGE, np.float32(0)))
    count = jnp.maximum(count, 1).astype(jnp.float32)
    return small / count + large / count * _LARGE


def _exponent_index(bits: jax.Array, read_as: Any, counts: jax.Array) -> jax.Array:
    """Where in `EXPONENTS` each number is counted; past the end if it is not."""
    info = np.finfo(read_as)
    leading_bit = jnp.int32(info.bits - 1) - lax.clz(bits).astype(jnp.int32)
    of_subnormal = leading_bit + np.int32(info.minexp - info.nmant)
    field = (bits >> np.array(info.nmant, bits.dtype)).astype(jnp.int32)
    of_normal = field + np.int32(info.minexp - 1)
    exponent = jnp.where(field == 0, of_subnormal, of_normal)
    index = jnp.clip(exponent - EXPONENTS.start, 0, len(EXPONENTS) - 1)
    return jnp.where(counts, index, np.int32(len(EXPONENTS)))


def _histogram(index: jax.Array) -> jax.Array:
    # A processor counts one by one; a TPU or a GPU is faster at comparing each number
    # with every bin, which it does while it reads the numbers for the other sums.
    def one_by_one(index):
        bins = jnp.zeros(len(EXPONENTS), jnp.int32)
        return bins.at[index].add(1, mode="drop")

    def bin_by_bin(index):
        bins = jnp.arange(len(EXPONENTS), dtype=jnp.int32)
        is_in = index[..., None] == bins.reshape((1,) * index.ndim + (-1,))
        return jnp.sum(is_in, axis=tuple(range(index.ndim)), dtype=jnp.int32)

    return lax.platform_dependent(index, cpu=one_by_one, default=bin_by_bin)
