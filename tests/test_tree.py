"""Casts, selects and finiteness of leaves: what every part of jaxmp stands on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmp import _tree
from tests.support.thinning import every_second

float0 = jax.dtypes.float0

# Leaves of which no function here makes anything else.
INERT = {
    "int": lambda: jnp.int32(3),
    "bool": lambda: jnp.bool_(True),
    "key": lambda: jax.random.key(0),
    "float0": lambda: np.zeros(2, float0),
    "text": lambda: "text",
    "object": object,
    "numpy int": lambda: np.arange(3),
}
FLOATING = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.float8_e5m2)


@pytest.mark.parametrize("name", INERT)
def test_inert_leaves_are_neither_floating_nor_non_finite(name, strict):
    leaf = INERT[name]()
    assert not _tree.is_inexact(leaf)
    assert _tree.at_least_float32(leaf) is leaf
    assert bool(_tree.all_finite({"leaf": leaf, "none": None}))


@pytest.mark.parametrize("name", INERT)
@pytest.mark.parametrize("pred", [True, False])
def test_inert_leaves_pass_a_select(name, pred, strict):
    leaf = INERT[name]()
    selected = _tree.select(jnp.bool_(pred), [leaf, None], [leaf, None])[0]
    if isinstance(leaf, jax.Array) or name == "numpy int":
        assert selected.dtype == jnp.asarray(leaf).dtype
        assert bool(jnp.all(selected == leaf))
    else:
        assert selected is leaf


@pytest.mark.parametrize("make", [jnp.ones, np.ones], ids=["jax", "numpy"])
@pytest.mark.parametrize("dtype", [*FLOATING, jnp.complex64])
def test_floating_arrays_are_inexact(make, dtype):
    assert _tree.is_array(make(2, dtype))
    assert _tree.is_inexact(make(2, dtype))
    assert _tree.is_inexact(make((), dtype))


def test_scalars_of_numpy_are_arrays_and_those_of_python_are_not():
    assert _tree.is_inexact(np.float32(1))
    assert not _tree.is_array(1.0)
    assert not _tree.is_array(jax.ShapeDtypeStruct((), jnp.float32))


# Finiteness

BAD = {"inf": jnp.inf, "-inf": -jnp.inf, "nan": jnp.nan}


@every_second(
    "dtype value make",
    [*FLOATING, np.float64, jnp.complex64],
    BAD,
    [jnp.asarray, np.asarray],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_bad_element_anywhere_is_found(dtype, value, make, strict):
    if make is jnp.asarray and dtype == np.float64:
        dtype = np.float32
    values = np.ones((3, 5), dtype)
    assert bool(_tree.all_finite([make(values), make(values[0])]))
    values[1, 2] = BAD[value]
    # float8_e4m3fn has no infinity; NumPy makes a NaN of it.
    assert not bool(_tree.all_finite([make(values), make(values[0])]))
    assert not bool(jax.jit(_tree.all_finite)([make(values[0]), make(values)]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_finite_values_whose_sum_overflows_are_finite(dtype, strict):
    values = {
        "ones": np.ones(70_000, dtype),
        "largest": np.full(100, jnp.finfo(dtype).max, dtype),
        "both": np.array([jnp.finfo(dtype).max, jnp.finfo(dtype).min], dtype),
    }
    assert bool(_tree.all_finite(values))
    assert bool(jax.jit(_tree.all_finite)(values))


def test_many_bad_elements_do_not_cancel_or_saturate(strict):
    values = jnp.concatenate([jnp.full(3, jnp.inf), jnp.full(3, -jnp.inf)])
    assert not bool(_tree.all_finite(values))
    assert not bool(_tree.all_finite(jnp.full(2**20, jnp.nan, jnp.float16)))


def test_python_floats_are_looked_at_as_jmp_looks_at_them(strict):
    assert bool(_tree.all_finite({"loss": 1.5, "steps": 3, "done": True}))
    for bad in (float("nan"), float("inf"), complex(0, float("nan"))):
        assert not bool(_tree.all_finite({"loss": bad}))


@pytest.mark.parametrize("tree", [None, {}, [], (), {"a": None}, jnp.ones((0, 3))])
def test_nothing_is_finite(tree, strict):
    finite = _tree.all_finite(tree)
    assert finite.dtype == jnp.bool_
    assert finite.shape == ()
    assert bool(finite)


def test_variables_of_nnx_are_looked_into():
    assert bool(_tree.all_finite({"w": nnx.Param(jnp.ones(2))}))
    assert not bool(_tree.all_finite({"w": nnx.Param(jnp.array([1.0, jnp.nan]))}))


def test_all_finite_of_sharded_and_batched_arrays(strict):
    x = jnp.ones((8, 3)).at[5, 1].set(jnp.nan)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert not bool(jax.jit(_tree.all_finite)(sharded))
    each = jax.vmap(_tree.all_finite)(x)
    assert np.array_equal(each, np.arange(8) != 5)


# Selects


@pytest.mark.parametrize("dtype", [*FLOATING, jnp.int32])
def test_a_select_is_bit_identical_to_what_it_takes(dtype, strict):
    # Every value there is, subnormals, infinities and -0.0 among them, but no NaN: it
    # stays one, and XLA's CPU rewrites its spare bits in bfloat16 and float8_e5m2.
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        values[np.not_equal(values, values)] = 1
    check_select(values)


@pytest.mark.parametrize("value", [True, False, complex(-0.0, jnp.inf)])
def test_booleans_and_complex_numbers_are_selected(value, strict):
    check_select(np.array([value, value]).astype(jnp.result_type(value)))


def check_select(values):
    select = jax.jit(_tree.select)
    others = np.zeros_like(values)
    for pred, trees in ((True, (values, others)), (False, (others, values))):
        result = select(jnp.bool_(pred), *trees)
        assert result.dtype == values.dtype
        assert np.asarray(result).tobytes() == values.tobytes()


def test_the_side_that_a_select_leaves_cannot_leak(strict):
    old = {"w": jnp.array([-0.0, 1.0])}
    for bad in BAD.values():
        new = {"w": jnp.full(2, bad)}
        kept = _tree.select(jnp.bool_(False), new, old)["w"]
        assert np.asarray(kept).tobytes() == np.asarray(old["w"]).tobytes()


# Dtypes


@pytest.mark.parametrize("make", [jnp.ones, np.ones], ids=["jax", "numpy"])
def test_at_least_float32_widens_the_halves_only(make, strict):
    for dtype in (jnp.float16, jnp.bfloat16):
        assert _tree.at_least_float32(make(2, dtype)).dtype == jnp.float32
    for dtype in (jnp.float32, jnp.complex64, jnp.float8_e4m3fn, jnp.int8):
        leaf = make(2, dtype)
        assert _tree.at_least_float32(leaf) is leaf
    with jax.enable_x64(True):
        leaf = make(2, np.float64)
        assert _tree.at_least_float32(leaf) is leaf


STRONG = [
    (1.5, jnp.float32),
    (3, jnp.int32),
    (True, jnp.bool_),
    (1.5j, jnp.complex64),
    (jnp.asarray(1.5), jnp.float32),
    (np.float64(1.5), jnp.float32),
    (jnp.float16(1.5), jnp.float16),
]


@pytest.mark.parametrize(("value", "dtype"), STRONG)
def test_strong_gives_the_dtype_that_jax_would_use(value, dtype, strict):
    result = _tree.strong(value)
    assert result.dtype == dtype
    assert not result.weak_type
    assert result == value


@pytest.mark.parametrize("leaf", [None, "text", np.zeros((), float0)], ids=str)
def test_strong_passes_what_is_no_number(leaf):
    assert _tree.strong(leaf) is leaf


def test_strong_and_like_pass_keys(strict):
    key = jax.random.key(0)
    assert _tree.strong(key).dtype == key.dtype
    assert _tree.like(key, key) is key


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.int32])
def test_like_takes_the_strong_dtype_of_the_reference(dtype, strict):
    result = _tree.like(jnp.asarray(2.0), jnp.zeros(3, dtype))
    assert result.dtype == dtype
    assert not result.weak_type
    assert _tree.like("text", result) == "text"
    assert _tree.like(result, None) is result


# Paths


def test_paths_are_written_with_slashes():
    tree = {"block_0": [{"kernel": 1}], "head": nnx.Param(jnp.ones(1)), "pair": (1, 2)}
    paths = [
        _tree.path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    assert paths[0] == "block_0/0/kernel"
    assert paths[1].startswith("head")
    assert paths[2:] == ["pair/0", "pair/1"]
