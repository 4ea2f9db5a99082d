"""Every kind of leaf through every cast of every policy, under strict promotion."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmp
from jaxmp.policy import Policy, cast_to_full, cast_to_half, get_policy

SPECS = (
    "mixed_bfloat16",
    "mixed_float16",
    "float32",
    "bf16-true",
    "p=bf16,c=f32,o=f16",
    "c=bf16,o=float8_e4m3fn",
    "p=float8_e5m2,c=f16,o=f32",
)
SPECS_X64 = (*SPECS, "64-true", "p=f64,c=bf16,o=f32")
CASTS = {
    "param_dtype": Policy.cast_to_param,
    "compute_dtype": Policy.cast_to_compute,
    "output_dtype": Policy.cast_to_output,
}

f8, f8e5 = jnp.float8_e4m3fn, jnp.float8_e5m2
float0 = jax.dtypes.float0


def struct(dtype, **kwargs):
    return jax.ShapeDtypeStruct((2,), dtype, **kwargs)


# Each makes a leaf; under x64 they are made, and cast, with x64 on.

CAST = {  # by every policy
    "float16": lambda: jnp.ones(2, jnp.float16),
    "bfloat16": lambda: jnp.ones(2, jnp.bfloat16),
    "float32": lambda: jnp.ones(2, jnp.float32),
    "scalar": lambda: jnp.float32(1),
    "empty": lambda: jnp.ones((0, 3), jnp.float32),
    "weak": lambda: jax.lax.full((2,), 1.0, jnp.float32) * jnp.asarray(1.0),
    "committed": lambda: jax.device_put(jnp.ones(2, jnp.float32), jax.devices()[-1]),
    "numpy float16": lambda: np.ones(2, np.float16),
    "numpy bfloat16": lambda: np.ones(2, jnp.bfloat16),
    "numpy float32": lambda: np.ones(2, np.float32),
    # Cast as jmp casts it: this is what NumPy code makes by default.
    "numpy float64": lambda: np.ones(2),
    "numpy float64 scalar": lambda: np.float64(1),
    "numpy float32 scalar": lambda: np.float32(1),
    "numpy float16 scalar": lambda: np.float16(1),
    "numpy swapped": lambda: np.ones(2, np.dtype(np.float32).newbyteorder()),
    "abstract": lambda: struct(jnp.float32),
    "abstract weak": lambda: struct(jnp.float32, weak_type=True),
    "abstract half": lambda: struct(jnp.float16),
}
NAMED = {  # by policies that name their dtype, and by no others
    "float8_e4m3fn": lambda: jnp.ones(2, f8),
    "float8_e5m2": lambda: jnp.ones(2, f8e5),
    "numpy float8": lambda: np.ones(2, f8),
    "abstract float8": lambda: struct(f8),
    "abstract float64": lambda: struct(jnp.float64),
}
NAMED_X64 = {
    "float64": lambda: jnp.ones(2, jnp.float64),
    "float64 scalar": lambda: jnp.float64(1),
}
KEPT = {  # by every policy
    "int32": lambda: jnp.int32(3),
    "int8": lambda: jnp.ones(2, jnp.int8),
    "int4": lambda: jnp.ones(2, jnp.int4),
    "uint8": lambda: jnp.ones(2, jnp.uint8),
    "bool": lambda: jnp.bool_(True),
    "complex64": lambda: jnp.complex64(1j),
    "other float8": lambda: jnp.ones(2, jnp.float8_e4m3b11fnuz),
    "key": lambda: jax.random.key(0),
    "keys": lambda: jax.random.split(jax.random.key(0), 3),
    "raw key": lambda: jax.random.PRNGKey(0),
    "float0": lambda: np.zeros(2, float0),
    "numpy int64": lambda: np.int64(3),
    "numpy bool": lambda: np.bool_(True),
    "numpy complex128": lambda: np.ones(2, np.complex128),
    "numpy text": lambda: np.array(["a", "b"]),
    "numpy object": lambda: np.array([None, 1.5]),
    "numpy record": lambda: np.ones(2, [("a", "f4")]),
    "numpy time": lambda: np.datetime64("2017-10-10"),
    "python float": lambda: 1.5,
    "python int": lambda: 3,
    "python bool": lambda: True,
    "python complex": lambda: 1.5j,
    "text": lambda: "float32",
    "object": object,
    "dtype": lambda: np.dtype("float32"),
    "abstract int": lambda: struct(jnp.int32),
    "abstract key": lambda: jax.eval_shape(lambda: jax.random.key(0)),
}
LEAVES = {**CAST, **NAMED, **NAMED_X64, **KEPT}


@contextlib.contextmanager
def strict_promotion(*, x64):
    """The fixture `strict` without its leak check, which compiles every cast anew."""
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        yield


def named_dtypes(policy):
    return {getattr(policy, field) for field in CASTS}


def expected_dtype(name, leaf, policy, target):
    """The dtype that a cast to `target` gives a leaf, None where it is left alone."""
    if name in CAST:
        return target
    if name in KEPT:
        return None
    return target if leaf.dtype in named_dtypes(policy) else None


def check(name, policy):
    """All that is true of one leaf under one policy."""
    leaf = LEAVES[name]()
    for field, cast in CASTS.items():
        target = getattr(policy, field)
        dtype = expected_dtype(name, leaf, policy, target)
        result = cast(policy, {"leaf": [leaf], "none": None})
        assert result["none"] is None
        (result,) = result["leaf"]
        if dtype is None:
            assert result is leaf
            continue
        assert result.dtype == dtype
        assert result.shape == leaf.shape
        assert isinstance(leaf, jax.Array) == isinstance(result, jax.Array)
        assert not getattr(result, "weak_type", False)
        if isinstance(result, (jax.Array, np.ndarray)):
            assert cast(policy, result) is result
        else:
            assert cast(policy, result) == result
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        assert np.all(np.asarray(result, np.float32) == np.asarray(leaf, np.float32))
        assert getattr(result, "sharding", None) == getattr(leaf, "sharding", None)
        check_traced(leaf, lambda x, cast=cast: cast(policy, x))


def check_traced(leaf, cast):
    """A cast has the same type eagerly, abstractly and under a transformation."""
    leaf = jnp.asarray(leaf.astype(leaf.dtype.newbyteorder("=")))
    result = cast(leaf)
    abstract = jax.eval_shape(cast, leaf)
    assert abstract.dtype == result.dtype
    assert abstract.weak_type == result.weak_type
    of_abstract = cast(jax.eval_shape(lambda: leaf))
    assert (of_abstract.dtype, of_abstract.shape) == (result.dtype, result.shape)
    assert of_abstract.weak_type == result.weak_type


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", [*CAST, *NAMED, *KEPT])
def test_casts_touch_only_float16_bfloat16_and_float32(name, spec):
    with strict_promotion(x64=False):
        check(name, get_policy(spec))


@pytest.mark.parametrize("spec", SPECS_X64)
@pytest.mark.parametrize("name", LEAVES)
def test_casts_touch_only_float16_bfloat16_and_float32_under_x64(name, spec):
    with strict_promotion(x64=True):
        check(name, get_policy(spec))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", [*CAST, *NAMED, *KEPT])
def test_cast_to_full_and_half_touch_only_float16_bfloat16_and_float32(name, x64):
    with strict_promotion(x64=x64):
        leaf = LEAVES[name]()
        for cast, dtype in ((cast_to_full, jnp.float32), (cast_to_half, jnp.float16)):
            if name in CAST:
                assert cast([leaf])[0].dtype == dtype
            else:
                assert cast([leaf])[0] is leaf


def test_a_whole_tree_at_once_keeps_its_structure(strict):
    tree = {name: make() for name, make in {**CAST, **NAMED, **KEPT}.items()}
    cast = get_policy("mixed_float16").cast_to_compute(tree)
    assert jax.tree.structure(cast) == jax.tree.structure(tree)
    for name in CAST:
        assert cast[name].dtype == jnp.float16
    for name in (*NAMED, *KEPT):
        assert cast[name] is tree[name]


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_come_back_in_the_dtype_of_what_was_cast(spec, strict):
    policy = get_policy(spec)

    def loss(w):
        return jnp.sum(policy.cast_to_compute(w).astype(jnp.float32))

    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        grad = jax.jit(jax.grad(loss))(jnp.ones(2, dtype))
        assert grad.dtype == dtype
        assert np.all(np.asarray(grad, np.float32) == 1)


def test_a_cast_can_be_vmapped_and_scanned(strict):
    policy = get_policy("mixed_bfloat16")
    tree = {"w": jnp.ones((3, 2)), "step": jnp.arange(3)}
    mapped = jax.vmap(policy.cast_to_compute)(tree)
    _, scanned = jax.lax.scan(
        lambda carry, x: (carry, policy.cast_to_compute(x)), None, tree
    )
    for result in (mapped, scanned):
        assert result["w"].dtype == jnp.bfloat16
        assert result["step"].dtype == jnp.int32


def test_variables_of_nnx_are_cast_in_place_of_their_values():
    policy = get_policy("mixed_float16")
    tree = {
        "param": nnx.Param(jnp.ones(2)),
        "mean": nnx.BatchStat(np.float32(1)),
        "count": nnx.Variable(jnp.int32(1)),
    }
    cast = policy.cast_to_compute(tree)
    for name, dtype in (("param", "f2"), ("mean", "f2"), ("count", "i4")):
        assert type(cast[name]) is type(tree[name])
        assert cast[name].dtype == dtype
    assert tree["param"].dtype == jnp.float32


def test_shardings_of_arrays_and_of_abstract_arrays_are_kept(strict):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    policy = get_policy("mixed_bfloat16")
    abstract = jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding)
    concrete = jax.device_put(jnp.ones((8, 2)), sharding)
    assert policy.cast_to_compute(abstract).sharding == sharding
    assert policy.cast_to_compute(concrete).sharding == sharding


@pytest.mark.parametrize("value", [70000.0, -70000.0, np.inf, np.nan, 1e-9, -0.0])
def test_values_out_of_range_round_as_in_any_cast(value, strict):
    cast = jaxmp.cast_to_half(jnp.float32(value))
    assert cast.tobytes() == np.asarray(jnp.float32(value).astype("f2")).tobytes()


def test_numpy_values_that_float16_cannot_hold_are_cast_as_numpy_casts_them():
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert np.isinf(jaxmp.cast_to_half(np.float32(70000)))
