"""Rounding to nearest and at random, splitting, and updates that land."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmp
from jaxmp._transformations.rounding import (
    join_float32,
    landing_update,
    round_to_nearest,
    split_float32,
)
from jaxmp.errors import OptimizerOptionError

# What is exact has to be so with LLVM's optimisation.
pytestmark = pytest.mark.optimised
HALF = ["bfloat16", "float16"]
SMALLEST_NORMAL = np.float32(2.0**-126)

stochastic_round = jax.jit(jaxmp.stochastic_round, static_argnums=1)

every_half = pytest.mark.parametrize("dtype", HALF)


def random_bits(count, seed=0):
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return bits.view(np.float32)


def float32_values():
    """Every magnitude alike, and the values at which something changes."""
    edges = [0.0, -0.0, 1.0, -1.0, 65504.0, 65519.99, 65520.0, 2.0**-14, 2.0**-24]
    edges += [2.0**-25, 3 * 2.0**-26, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11]
    edges += [3.3895314e38, 3.4e38, np.finfo(np.float32).max, np.inf, -np.inf]
    return np.concatenate([np.float32(edges), random_bits(100_000)])


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


@every_half
def test_round_to_nearest_is_ieee_rounding(dtype, strict):
    x = float32_values()
    x = x[~np.isnan(x)]
    if dtype == "float16":  # the sign of a float32 subnormal is flushed on the CPU
        x = x[(x == 0) | (np.abs(x) >= SMALLEST_NORMAL)]
    rounded = jax.jit(round_to_nearest, static_argnums=1)(jnp.asarray(x), dtype)
    with np.errstate(over="ignore"):
        expected = x.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(
        bits(np.asarray(rounded).astype(dtype)), bits(expected)
    )
    exact = np.asarray(rounded).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(bits(rounded), bits(exact))


def split(x):
    high, low = jax.jit(split_float32)(jnp.asarray(x))
    return high.astype(jnp.bfloat16), low


def test_split_and_join_are_exact(strict):
    x = float32_values()
    x = x[~np.isnan(x)]
    high, low = split(x)
    assert (high.dtype, low.dtype) == (jnp.bfloat16, jnp.uint16)
    np.testing.assert_array_equal(bits(jax.jit(join_float32)(high, low)), bits(x))


def test_split_rounds_to_nearest():
    x = float32_values()
    x = x[np.isfinite(x) & (np.abs(x) < 3.38e38)]
    high, _ = split(x)
    nearest = x.astype(jnp.bfloat16)
    is_tie = bits(x) & 0xFFFF == 0x8000
    np.testing.assert_array_equal(bits(high)[~is_tie], bits(nearest)[~is_tie])
    away = np.abs(np.asarray(high, np.float64)) >= np.abs(x.astype(np.float64))
    assert away[is_tie].all()


def test_split_keeps_nan_a_nan():
    nans = np.uint32([0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFFFF8000]).view(np.float32)
    high, low = split(nans)
    assert jnp.isnan(high).all()
    assert jnp.isnan(jax.jit(join_float32)(high, low)).all()


def lands(p, target):
    dtype = p.dtype
    update = landing_update(jnp.asarray(target, jnp.float32), jnp.asarray(p))
    return (np.asarray(p, np.float32) + np.asarray(update)).astype(dtype)


def half_numbers(dtype):
    """Uniform in bit patterns: all exponents, finite, both signs."""
    largest = int(bits(np.asarray(jnp.finfo(dtype).max)))
    magnitude = st.integers(0, largest)

    def number(magnitude, negative):
        return np.uint16(magnitude | (negative << 15)).view(jnp.dtype(dtype))

    return st.builds(number, magnitude, st.booleans())


def is_promised(p, target):
    """The condition in the docstring of `_rounding`."""
    size, new = abs(float(p)), abs(float(target))
    if abs(float(target) - float(p)) > float(np.finfo(np.float32).max):
        return False
    if target == 0 or new >= size:
        return True
    if p.dtype == jnp.bfloat16:
        return new >= size * 2.0**-16 and new >= 2.0**-118
    return new >= size * 2.0**-13 or size < 0.5


@every_half
def test_updates_land_wherever_it_is_promised(dtype):
    @settings(max_examples=1000, deadline=None, derandomize=True)
    @given(half_numbers(dtype), half_numbers(dtype))
    def check(p, target):
        # NumPy keeps subnormal numbers; on a CPU, XLA flushes them.
        p32, target32 = np.float32(p), np.float32(target)
        with np.errstate(over="ignore"):
            update = np.float32(-0.0) if target32 == p32 else target32 - p32
            landed = (p32 + update).astype(p.dtype)
        if is_promised(p, target):
            assert landed == target

    check()


@every_half
def test_update_that_lands_is_what_numpy_says(dtype):
    rng = np.random.default_rng(0)
    largest = int(bits(np.asarray(jnp.finfo(dtype).max)))
    p = rng.integers(0, largest, 50_000, dtype=np.uint16).view(jnp.dtype(dtype))
    step = rng.integers(-300, 300, p.size)
    target = np.clip(bits(p) + step, 0, largest).astype(np.uint16).view(p.dtype)
    normal = np.minimum(np.float32(p), np.float32(target)) >= 2.0**-118
    p, target = p[normal], target[normal]
    np.testing.assert_array_equal(bits(lands(p, target)), bits(target))


@every_half
def test_standing_still_changes_no_bit(dtype):
    p = np.asarray([0.0, -0.0, 1.5, -2.0, np.inf], dtype)
    update = landing_update(jnp.asarray(p, jnp.float32), jnp.asarray(p))
    assert np.signbit(update).all()
    np.testing.assert_array_equal(bits(p + np.asarray(update).astype(dtype)), bits(p))


# Stochastic rounding


@every_half
def test_stochastic_round_keeps_what_is_representable(dtype, strict):
    every = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    every = every[~np.isnan(every.astype(np.float32))]
    x = jnp.asarray(every.astype(np.float32))
    rounded = stochastic_round(x, dtype, jax.random.key(0))
    np.testing.assert_array_equal(bits(rounded), bits(every))


@every_half
def test_stochastic_round_keeps_nan_and_never_makes_infinity(dtype):
    nans = np.uint32([0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800001]).view(np.float32)
    assert jnp.isnan(stochastic_round(nans, dtype, jax.random.key(1))).all()
    info = jnp.finfo(dtype)
    beyond = jnp.full(1000, jnp.float32(info.max) * jnp.float32(1.003))
    rounded = stochastic_round(-beyond, dtype, jax.random.key(2))
    assert (rounded == -info.max).all()


@every_half
def test_stochastic_round_takes_a_neighbour(dtype):
    x = random_bits(100_000, seed=3)
    x = x[np.isfinite(x) & (np.abs(x) < float(jnp.finfo(dtype).max))]
    if dtype == "float16":
        x = x[np.abs(x) >= 2.0**-40]
    rounded = stochastic_round(jnp.asarray(x), dtype, jax.random.key(4))
    patterns = bits(x.astype(jnp.dtype(dtype))).astype(int)
    assert (np.abs(bits(rounded).astype(int) - patterns) <= 1).all()
    exact = x.astype(np.float64)
    gap = np.abs(np.asarray(rounded, np.float64) - exact)
    info = jnp.finfo(dtype)
    exponent = np.maximum(np.frexp(exact)[1] - 1, info.minexp)
    assert (gap < np.ldexp(1.0, exponent - info.nmant)).all()


@every_half
@pytest.mark.parametrize(
    "value", [1 + 1e-4, -(1 + 1e-4), 3e-7, 1.7e-5, 0.3, 1000.3, 2 - 1e-4]
)
def test_stochastic_round_is_unbiased_under_jit(dtype, value):
    draws = 10_000
    x = jnp.full(draws, value, jnp.float32)

    @jax.jit
    def mean_of_round_trip(key):
        return jaxmp.stochastic_round(x, dtype, key).astype(jnp.float32)

    rounded = np.asarray(mean_of_round_trip(jax.random.key(5)), np.float64)
    low, high = np.unique(rounded)
    share = (float(np.float32(value)) - low) / (high - low)
    deviation = np.sqrt(share * (1 - share) / draws)
    assert abs(np.mean(rounded == high) - share) < 3 * deviation


def test_the_same_key_gives_the_same_bits():
    x = jnp.asarray(random_bits(1000, seed=6))
    first, again, other = (
        bits(stochastic_round(x, "bfloat16", jax.random.key(seed)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first[:4].tolist() == KNOWN_BITS


# Threefry and integers: the same on every backend and in every release.
KNOWN_BITS = [29166, 35269, 33932, 22497]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "float64"])
def test_stochastic_round_refuses_other_dtypes(dtype):
    with pytest.raises(OptimizerOptionError, match=f"no rounding to {dtype}.*bfloat16"):
        jaxmp.stochastic_round(jnp.ones(2), dtype, jax.random.key(0))
