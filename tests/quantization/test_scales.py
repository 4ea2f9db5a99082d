"""Scales are powers of two that fill a format, and rounding is that of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import NoSecondDerivative
from jaxmp.quantization import _rounding
from jaxmp.quantization._rounding import inverse_scale, reciprocal
from jaxmp.quantization.recipe import E4M3, E5M2, INT8
from jaxmp.quantization.scales import quantize
from tests.support.quantized import SMALLEST, largest_number, quantized

FORMATS = (E4M3, E5M2, INT8)
HALF = (jnp.bfloat16, jnp.float16)
DTYPES = (*HALF, jnp.float32)

formats = pytest.mark.parametrize("small", FORMATS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)


def arrays(dtype, seed=0, count=20):
    """Arrays of all magnitudes that a dtype has, with zeros and small numbers."""
    rng = np.random.default_rng(seed)
    info = jnp.finfo(dtype)
    low, high = np.log2(float(info.tiny)) + 12, np.log2(float(info.max)) - 4
    for _ in range(count):
        x = rng.standard_normal((5, 8)) * 2.0 ** rng.uniform(low, high)
        x *= rng.choice([0.0, 1.0, 1.0, 2.0**-9], x.shape)
        yield jnp.asarray(x, dtype)


def bits(x):
    return np.asarray(x).view(np.uint8)


def is_power_of_two(x):
    mantissa, _ = np.frexp(np.asarray(x, np.float64))
    return np.isfinite(x) & (mantissa == 0.5)


# The scale


@formats
@dtypes
def test_a_scale_is_the_largest_power_of_two_that_keeps_an_array_in_range(small, dtype):
    for x in arrays(dtype):
        for axes in (None, (1,)):
            _, inverse = quantize(x, small, axes)
            assert inverse.dtype == np.float32
            assert np.all(is_power_of_two(inverse))
            exact = np.abs(np.asarray(x, np.float64))
            largest = np.max(exact, axis=axes, keepdims=True)
            filled = largest / np.asarray(inverse, np.float64)
            assert np.all(filled <= largest_number(small))
            is_large = largest >= SMALLEST
            assert np.all(filled[is_large] > largest_number(small) / 2)


@formats
def test_exactly_the_largest_number_is_reached_and_the_next_one_is_not(small):
    for exponent in (-90, -3, 0, 7, 100):
        most = np.float32(largest_number(small) * 2.0**exponent)
        above = np.nextafter(most, np.float32(np.inf))
        below = np.nextafter(most, np.float32(0))
        found = [float(inverse_scale(jnp.float32(x), small)) for x in (below, most)]
        assert found == [2.0**exponent] * 2
        assert float(inverse_scale(jnp.float32(above), small)) == 2.0 ** (exponent + 1)


def test_reciprocals_are_exact_wherever_they_are_normal():
    powers = 2.0 ** np.arange(-126.0, 127)
    assert np.array_equal(reciprocal(jnp.asarray(powers, jnp.float32)), 1 / powers)


SMALL_AND_LARGE = {
    "zeros": 0.0,
    "a float32 subnormal": 1e-40,
    "the smallest normal number": float(jnp.finfo(jnp.float32).tiny),
    "below what scales follow": 2.0**-110,
    "the largest of bfloat16": float(jnp.finfo(jnp.bfloat16).max),
    "the largest of float32": float(jnp.finfo(jnp.float32).max),
}


@formats
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_a_scale_is_finite_at_both_ends_of_the_range(small, name):
    x = jnp.float32(SMALL_AND_LARGE[name]) * jnp.asarray([[1.0, -1.0], [0.0, 0.5]])
    values, inverse = quantize(x, small, None)
    assert np.all(is_power_of_two(inverse))
    # Their products with what is multiplied are normal numbers too.
    assert 2.0**-126 <= float(inverse.item()) <= 2.0**126
    again = np.asarray(values, np.float64) * np.asarray(inverse, np.float64)
    step = 2.0**-4 * np.abs(x) + 2.0**-108
    assert np.all(np.abs(again - np.asarray(x, np.float64)) <= step)


@formats
@pytest.mark.parametrize("axes", [None, (1,), (0,), ()], ids=str)
def test_an_inverse_is_nan_exactly_where_a_number_is_not_finite(small, axes):
    ones, at = np.ones((4, 6), np.float32), np.zeros((4, 6), bool)
    at[2, 3] = True
    expected = np.any(at, axis=axes, keepdims=True)
    for bad in (np.nan, np.inf, -np.inf):
        x = jnp.asarray(np.where(at, bad, ones), jnp.bfloat16)
        found = quantize(x, small, axes)
        assert np.array_equal(np.isnan(found.inverse), expected)
        assert np.all(is_power_of_two(found.inverse) | expected)
        again = np.asarray(found.in_dtype(jnp.float32))
        assert np.array_equal(np.isfinite(again), ~np.broadcast_to(expected, (4, 6)))


# The values


@formats
@dtypes
def test_values_are_those_of_numpy_bit_for_bit_however_they_are_computed(small, dtype):
    for axes in ((0, 1), (1,)):

        def run(x, axes=axes):
            return quantize(x, small, axes)

        jitted, vmapped = jax.jit(run), jax.jit(jax.vmap(run))
        for x in arrays(dtype, seed=1):
            expected, inverse = quantized(x, small, axes)
            in_batch = jax.tree.map(lambda x: x[1], vmapped(jnp.stack([x * 0, x])))
            for found in (run(x), jitted(x), in_batch):
                assert found.values.dtype == small
                assert np.array_equal(bits(found.values), bits(expected))
                assert np.array_equal(found.inverse, inverse)


@pytest.mark.parametrize(
    ("small", "x", "rounded"),
    [
        (INT8, [127, 0.5, 1.5, 2.5, -0.5, -2.5], [127, 0, 2, 2, 0, -2]),
        (E4M3, [448, 17, 19, -17, 2.0**-10, 2.0**-9], [448, 16, 20, -16, 0, 2.0**-9]),
        (E5M2, [57344, 9, 11, -9, 2.0**-17, 2.0**-16], [57344, 8, 12, -8, 0, 2.0**-16]),
    ],
    ids=str,
)
def test_halves_are_rounded_to_even(small, x, rounded):
    values, inverse = quantize(jnp.asarray(x, jnp.float32), small, None)
    assert float(inverse.item()) == 1
    assert np.array_equal(np.asarray(values, np.float32), rounded)


@formats
def test_what_a_format_holds_is_kept_exactly(small):
    """Whatever power of two it is multiplied by, and in whichever dtype it is."""
    every = np.arange(256, dtype=np.uint8).view(small)
    numbers = every[np.isfinite(every.astype(np.float32)) & (every != INT8.type(-128))]
    # Scaled down, the smallest of e5m2 would be subnormal.
    for dtype, exponents in ((jnp.bfloat16, (-80, 0, 80)), (jnp.float32, (-60, 3))):
        for exponent in exponents:
            x = jnp.asarray(numbers.astype(np.float64) * 2.0**exponent, dtype)
            found = quantize(x, small, None)
            assert np.array_equal(np.asarray(found.in_dtype(dtype)), np.asarray(x))
            assert float(found.inverse.item()) == 2.0**exponent


@formats
def test_a_row_is_rounded_as_if_it_stood_alone(small):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, 7)), jnp.bfloat16)
    rows = quantize(x * jnp.asarray(2.0 ** np.arange(5)[:, None], x.dtype), small, (1,))
    for i, row in enumerate(x):
        alone = quantize(row, small, None)
        assert np.array_equal(bits(rows.values[i]), bits(alone.values))
        assert float(rows.inverse[i, 0]) == float(alone.inverse[0]) * 2.0**i


@formats
def test_an_empty_array_has_a_scale_too(small):
    values, inverse = quantize(jnp.ones((0, 3), jnp.bfloat16), small, None)
    assert values.shape == (0, 3)
    assert np.all(is_power_of_two(inverse))
    _, inverse = quantize(jnp.ones((2, 0), jnp.bfloat16), small, (1,))
    assert inverse.shape == (2, 1)
    assert np.all(is_power_of_two(inverse))


# Its derivative


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.hessian])
def test_it_has_no_derivative_and_says_what_to_do(transform):
    def fn(x):
        return quantize(x, E4M3, None).in_dtype(jnp.float32).sum()

    with pytest.raises(NoSecondDerivative, match=r"twice.*'mixed_bfloat16'.*'none'"):
        transform(fn)(jnp.ones(4))


# What each compiler gets


@formats
@pytest.mark.parametrize("dtype", HALF, ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(24, 16), (160, 128), (4, 96, 64)], ids=str)
@pytest.mark.parametrize("is_weight", [True, False])
def test_all_platforms_round_alike(small, dtype, shape, is_weight):
    x = jnp.asarray(np.random.default_rng(0).standard_t(2, shape), dtype)
    for axes in (tuple(range(len(shape))), (len(shape) - 1,), (0,)):
        found = [
            _rounding._on_cpu(x, small, axes),
            _rounding._on_gpu(x, small, axes, is_weight),
            _rounding._in_one_step(x, small, axes),
        ]
        for values, inverse in found[1:]:
            assert np.array_equal(bits(values), bits(found[0][0]))
            assert np.array_equal(inverse, found[0][1])
