"""Statistics are those of NumPy in float64, whatever the numbers and their dtype."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmp.errors import NumericsError
from jaxmp.numerics import statistics
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.ranges._statistics import EXPONENTS

FORMATS = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32"]
SOURCES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
SHAPE = (24, 32)


@functools.cache
def compiled(dtype):
    return jax.jit(functools.partial(statistics, dtype=dtype))


def of(x, dtype=None):
    return compiled(dtype)(x)[""]


def rounded(x, dtype):
    """float64 numbers rounded to a format by another implementation than XLA's."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return x.astype(dtype).astype(np.float64)


def expected(x, dtype):
    """The statistics of an array by NumPy in float64, from their definitions."""
    dtype = np.dtype(ml_dtypes.finfo(dtype).dtype)
    with np.errstate(invalid="ignore"):
        wide = np.abs(x.astype(np.float64)).ravel()
    finite = wide[np.isfinite(wide)]
    nonzero = finite[finite > 0]
    became = rounded(finite, dtype)
    is_small = became < float(ml_dtypes.finfo(dtype).smallest_normal)
    exponents = np.frexp(nonzero)[1] - 1
    bins = np.append(EXPONENTS, EXPONENTS.stop)
    return {
        "amax": finite.max(initial=0),
        "smallest": nonzero.min(initial=np.inf) if nonzero.size else 0,
        "mean": finite.mean() if finite.size else 0,
        "size": wide.size,
        "zeros": np.sum(finite == 0),
        "underflows": np.sum((finite > 0) & (became == 0)),
        "subnormals": np.sum((became > 0) & is_small),
        "overflows": np.sum(~np.isfinite(became)),
        "nonfinite": wide.size - finite.size,
        "exponents": np.histogram(exponents, bins)[0],
    }


def assert_right(x, dtype):
    found, wanted = of(x, dtype), expected(x, dtype)
    for name, value in wanted.items():
        actual = np.asarray(getattr(found, name))
        assert actual.dtype == (
            np.float32 if name in ("amax", "smallest", "mean") else np.int32
        )
        if name == "mean":
            # Numbers below 2^-94 count as zero in it.
            np.testing.assert_allclose(actual, value, rtol=1e-5, atol=2.0**-94)
        else:
            np.testing.assert_array_equal(actual, value, err_msg=name)


def every_number(dtype):
    bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=np.uint32)
    return bits.astype(f"uint{8 * np.dtype(dtype).itemsize}").view(dtype)


def borders(dtype):
    """Every float32 border of a format, and its neighbours above and below."""
    info = format_range(dtype)
    values = [
        *(info.largest, info.overflows, info.smallest_normal, info.becomes_normal),
        *(info.smallest_subnormal, info.becomes_zero, 1.5 * info.smallest_subnormal),
    ]
    with np.errstate(over="ignore", under="ignore"):
        x = np.array(values).astype(np.float32)
        x = x[np.isfinite(x)]
        up, down = np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))
    return np.concatenate([x, up, down, -x, -up, -down])


def random_numbers(dtype):
    del dtype
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE) * np.exp2(rng.uniform(-140, 120, SHAPE))
    return x.astype(np.float32)


# Values


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", SOURCES[1:])
def test_every_number_of_a_small_format_is_counted_right(source, dtype):
    x = every_number(source)
    assert_right(np.resize(x, SHAPE) if x.size < 1000 else x, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("make", [borders, random_numbers])
def test_the_borders_of_a_format_are_to_the_last_bit(make, dtype):
    assert_right(np.resize(make(dtype), SHAPE), dtype)


def test_each_exponent_has_its_bin():
    counts = np.arange(len(EXPONENTS)) % 7 + 1
    x = np.ldexp(np.float32(1), np.repeat(EXPONENTS, counts))
    np.testing.assert_array_equal(of(x).exponents, counts)


special = st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 65520.0])
floats = st.one_of(st.floats(width=32), special)
exponents = st.integers(-149, 127).map(lambda e: math.ldexp(1.0, e))


@hypothesis.given(
    x=hnp.arrays(np.float32, 12, elements=st.one_of(floats, exponents)),
    dtype=st.sampled_from(FORMATS),
    source=st.sampled_from(SOURCES),
)
@hypothesis.settings(max_examples=300)
def test_any_array_is_counted_right(x, dtype, source):
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        assert_right(np.resize(x, SHAPE).astype(source), dtype)


@pytest.mark.parametrize("size", [3e38, 2.0**-94])
def test_a_mean_neither_overflows_nor_underflows(size):
    assert float(of(np.full(1000, size, np.float32)).mean) == pytest.approx(size)


def test_more_than_2_to_the_24_numbers_are_counted_exactly():
    found = of(np.ones(2**24 + 3, np.float16))
    assert int(found.size) == int(found.exponents.sum()) == 2**24 + 3
    assert int(found.exponents[0 - EXPONENTS.start]) == 2**24 + 3


# float64


@pytest.mark.parametrize("dtype", [*FORMATS, "float64"])
def test_float64_is_looked_at_in_float64(dtype):
    x = np.array([0, 1e-320, 1e-300, 1e-46, 1.0, 65519.999999999, 65520, 1e40, np.inf])
    with jax.enable_x64(True):
        found, wanted = statistics(jnp.asarray(x), dtype)[""], expected(x, dtype)
    for name in ("zeros", "underflows", "subnormals", "overflows", "nonfinite"):
        assert int(getattr(found, name)) == wanted[name], name
    assert np.isfinite(found.amax)
    assert found.exponents[0] == 3
    assert found.exponents[-1] == 1
    assert found.exponents.dtype == jnp.int32


# Trees


def test_paths_name_the_leaves_and_what_has_no_range_is_left_out():
    tree = {
        "block": [{"w": jnp.ones((2, 3))}, jnp.bfloat16(2)],
        "step": jnp.int32(3),
        "mask": jnp.ones(2, bool),
        "key": jax.random.key(0),
        "float0": np.zeros(2, jax.dtypes.float0),
        "none": None,
        "python": 0.5,
    }
    found = statistics(tree)
    assert sorted(found) == ["block/0/w", "block/1", "python"]
    assert found["block/0/w"].size == 6
    assert found["python"].amax == 0.5


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
@pytest.mark.parametrize("source", SOURCES)
def test_scalars_and_empty_arrays(shape, source):
    x = np.full(shape, 2.0).astype(source)
    assert_right(x, "float16")
    assert float(of(x).fraction("zeros")) == 0


def test_a_complex_number_is_two():
    x = np.array([1 + 2j, complex(0, np.nan), complex(np.inf, 1e-30)], np.complex64)
    found, parts = of(x, "float16"), of(x.view(np.float32), "float16")
    jax.tree.map(np.testing.assert_array_equal, found, parts)
    assert found.size == 6


def test_a_tree_without_floats_has_no_statistics():
    assert statistics({"step": jnp.int32(3), "none": None}) == {}


def test_fractions_are_shares_of_all_numbers():
    found = of(np.array([0, 0, 1e-9, 1e9, 1, 2, 3, np.nan], np.float32), "float16")
    for count, share in {
        "zeros": 0.25,
        "underflows": 0.125,
        "overflows": 0.125,
    }.items():
        assert found.fraction(count) == share


# Where it runs


def test_without_jit_under_strict_promotion_and_under_vmap(strict):
    x = jnp.asarray(borders("float16")).reshape(2, -1)
    assert_same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    assert_same(statistics(x, "float16"), compiled("float16")(x))
    rows = jax.jit(jax.vmap(functools.partial(statistics, dtype="float16")))(x)
    for i in range(2):
        row = jax.tree.map(lambda s, i=i: s[i], rows)
        assert_same(row, compiled("float16")(x[i]))


@pytest.mark.devices(8)
def test_sharded_arrays_are_counted_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(every_number("float16")).reshape(64, -1)
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    jax.tree.map(
        np.testing.assert_array_equal,
        compiled("bfloat16")(sharded)[""]._replace(mean=0),
        compiled("bfloat16")(x)[""]._replace(mean=0),
    )


def test_comparing_with_every_bin_counts_the_same(monkeypatch):
    def not_on_a_cpu(x, *, cpu, default):
        return default(x)

    x = jnp.asarray(every_number("float16"))
    wanted = of(x)
    monkeypatch.setattr(jax.lax, "platform_dependent", not_on_a_cpu)
    jax.tree.map(np.testing.assert_array_equal, statistics(x)[""], wanted)


# Formats


@pytest.mark.parametrize("dtype", [*FORMATS, "float64"])
def test_ranges_are_those_of_ml_dtypes(dtype):
    info, found = ml_dtypes.finfo(dtype), format_range(dtype)
    assert found.name == np.dtype(info.dtype).name
    assert found.largest == float(info.max)
    assert found.smallest_normal == float(info.smallest_normal)
    assert found.smallest_subnormal == float(info.smallest_subnormal)
    assert found.eps == float(info.eps)


@pytest.mark.parametrize("dtype", FORMATS[:-1])
def test_borders_are_where_rounding_changes(dtype):
    found = format_range(dtype)
    x = np.float32([found.becomes_zero, found.becomes_normal, found.overflows])
    above = rounded(np.nextafter(x, np.float32(np.inf)), dtype)
    at, below = rounded(x, dtype), rounded(np.nextafter(x, np.float32(0)), dtype)
    assert (at[0], above[0]) == (0, found.smallest_subnormal)
    assert below[1] < found.smallest_normal == at[1]
    assert below[2] == found.largest
    assert not np.isfinite(above[2])
    assert np.isfinite(at[2]) != found.border_overflows


@pytest.mark.parametrize("dtype", ["int8", "float17", "complex64", 3.5])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(NumericsError, match="Use float16, bfloat16"):
        statistics(jnp.ones(2), dtype)
