"""Rounding that survives XLA, and updates that land on the rounded value.

XLA may keep more precision than a program asks for: on GPU and TPU it drops the pair of
casts float32 -> bfloat16 -> float32. It leaves `reduce_precision` and integer
operations alone, so everything that must really be rounded is rounded by those.

An optimizer returns an update u; `optax.apply_updates` computes p + u in float32 and
casts the sum to the dtype of p. To land on a chosen half value r, `landing_update`
returns u = r - p in float32. Then p + u equals r up to half a float32 ulp of p, and the
cast removes the difference, unless the ulp of r is just as small. So the update lands
on r in one step

    in bfloat16    unless the weight falls below 2^-16 of its former size,
    in float16     unless a weight of 1/2 or more falls below 2^-13 of it.

At the ends of bfloat16's range, r - p itself has to be a float32 number: below 2^-118
it may be flushed to zero as subnormal (on CPU and TPU), and from 2^127 to -2^127 it is
infinite. A weight that is moved onto -0.0 lands on +0.0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SMALLEST_NORMAL_FLOAT16 = np.float32(2.0**-14)
NAN_BITS = np.uint32(0x7FC00000)
LOW_BITS = np.uint32(0xFFFF)
HALF_OF_LAST_PLACE = np.uint32(0x8000)
FLOAT16_SUBNORMALS_PER_UNIT = np.float32(2.0**24)


def round_to_nearest(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds float32 to the nearest value of float16 or bfloat16, ties to even.

    Args:
      x: float32 array.
      dtype: float16 or bfloat16; float32 leaves `x` as it is.

    Returns:
      A float32 array of values that `dtype` can represent.
    """
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.dtype == jnp.float16:
        # `reduce_precision` flushes subnormal results, where float16 is fixed-point.
        steps = lax.round(
            x * FLOAT16_SUBNORMALS_PER_UNIT, lax.RoundingMethod.TO_NEAREST_EVEN
        )
        is_subnormal = jnp.abs(x) < SMALLEST_NORMAL_FLOAT16
        rounded = jnp.where(is_subnormal, steps / FLOAT16_SUBNORMALS_PER_UNIT, rounded)
    return rounded


def landing_update(target: jax.Array, p: jax.Array) -> jax.Array:
    """Returns the float32 update that moves `p` onto `target`.

    Args:
      target: float32 array of values that the dtype of `p` can represent.
      p: float16 or bfloat16 array of the same shape.

    Returns:
      A float32 array; where `p` equals `target`, it is -0.0, which changes no number.
    """
    p = p.astype(jnp.float32)
    return jnp.where(target == p, np.float32(-0.0), target - p)


def split_float32(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into the nearest bfloat16 and the 16 bits that it lacks.

    Ties go away from zero: with ties to even, two float32 numbers would share one pair.

    Args:
      x: float32 array.

    Returns:
      A float32 array of values that bfloat16 can represent, and a uint16 array.
      `join_float32` restores every bit of `x` from the two.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.where(jnp.isnan(x), NAN_BITS, bits)
    high = (bits + HALF_OF_LAST_PLACE) & ~LOW_BITS
    low = (bits & LOW_BITS).astype(jnp.float32)
    # The TPU compiler would give an output of integer operations alone its own kernel,
    # and compute the whole update again there. A maximum with a negative float changes
    # no bit and keeps both outputs in one kernel.
    low = jnp.maximum(low, jnp.minimum(x, np.float32(-1))).astype(jnp.uint16)
    return lax.bitcast_convert_type(high, jnp.float32), low


def join_float32(high: jax.Array, low: jax.Array) -> jax.Array:
    """Joins what `split_float32` has split.

    Args:
      high: bfloat16 array.
      low: uint16 array of the same shape.

    Returns:
      A float32 array.
    """
    # Only 32-bit numbers are bitcast: the TPU compiler does not fuse narrower ones.
    bits = lax.bitcast_convert_type(high.astype(jnp.float32), jnp.uint32)
    low = low.astype(jnp.uint32)
    was_rounded_up = low & HALF_OF_LAST_PLACE
    bits = (bits & ~LOW_BITS) + low - (was_rounded_up + was_rounded_up)
    return lax.bitcast_convert_type(bits, jnp.float32)
