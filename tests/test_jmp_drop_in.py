"""`import jaxmp as jmp`: jmp's own tests pass unchanged, and its defects are gone."""

import importlib.util
import inspect
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

import jaxmp


def load_jmp_test(name, library):
    """Runs the source of one of jmp's installed test files against `library`.

    Each file gets at jmp by `from jmp._src import policy as jmp` or `loss_scale as
    jmp`; while it is executed, both names stand for `library`.
    """
    path = Path(jmp.__file__).parent / "_src" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{library.__name__}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    src = types.SimpleNamespace(policy=library, loss_scale=library)
    with mock.patch.dict(sys.modules, {"jmp._src": src, spec.name: module}):
        spec.loader.exec_module(module)
    return module


policy_test = load_jmp_test("policy_test", jaxmp)
loss_scale_test = load_jmp_test("loss_scale_test", jaxmp)

PolicyTest = policy_test.PolicyTest
LossScaleTest = loss_scale_test.LossScaleTest
# jmp's test itself computes float32(10) / 3**100.
LossScaleTest.pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
]


def jmp_tests_in(module):
    classes = vars(module).values()
    return {
        f"{cls.__name__}.{test}"
        for cls in classes
        if inspect.isclass(cls) and issubclass(cls, unittest.TestCase)
        for test in unittest.defaultTestLoader.getTestCaseNames(cls)
    }


def test_this_file_collects_every_test_of_jmps_files():
    assert policy_test.jmp is jaxmp
    assert loss_scale_test.jmp is jaxmp
    expected = jmp_tests_in(load_jmp_test("policy_test", jmp))
    expected |= jmp_tests_in(load_jmp_test("loss_scale_test", jmp))
    assert len(expected) == 97
    assert jmp_tests_in(sys.modules[__name__]) == expected


# The names and how they are called


@pytest.mark.parametrize("name", jmp.__all__)
def test_every_public_name_of_jmp_exists(name):
    assert name in jaxmp.__all__
    assert type(getattr(jaxmp, name)) is not types.ModuleType


def callables_of_jmp():
    for name in jmp.__all__:
        value = getattr(jmp, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}"


def look_up(library, path):
    for name in path.split("."):
        library = getattr(library, name)
    return library


@pytest.mark.parametrize("path", list(callables_of_jmp()))
def test_every_callable_of_jmp_can_be_called_as_in_jmp(path):
    theirs = list(inspect.signature(look_up(jmp, path)).parameters.values())
    ours = list(inspect.signature(look_up(jaxmp, path)).parameters.values())
    for their, our in zip(theirs, ours, strict=False):
        assert their.kind == our.kind
        assert (their.default is their.empty) == (our.default is our.empty)
        # "spec" says what get_policy takes now, which is more than a name.
        assert {their.name, our.name} in ({their.name}, {"policy_name", "spec"})
    assert len(ours) >= len(theirs)
    for added in ours[len(theirs) :]:
        assert added.default is not added.empty


@pytest.mark.parametrize("name", ["NoOpLossScale", "StaticLossScale"])
def test_loss_scale_is_the_union_of_the_three(name):
    make = getattr(jaxmp, name)
    scale = make() if name == "NoOpLossScale" else make(2)
    assert isinstance(scale, jaxmp.LossScale)
    assert isinstance(jaxmp.DynamicLossScale(2.0), jaxmp.LossScale)
    assert not isinstance(2.0, jaxmp.LossScale)


# A jaxmp.Policy where a jmp.Policy is expected

ours = jaxmp.Policy("float32", "bfloat16", "float16")
theirs = jmp.Policy(jnp.float32, jnp.bfloat16, jnp.float16)
others = [
    jmp.Policy(jnp.float32, jnp.bfloat16, jnp.float32),
    jmp.Policy(jnp.float32, jnp.float16, jnp.float16),
    jmp.Policy(jnp.bfloat16, jnp.bfloat16, jnp.float16),
    jaxmp.Policy("float32", "bfloat16", "float16", matmul_precision="tf32"),
    # jmp checks nothing, so that these exist.
    jmp.Policy("nonsense", None, 3),
    "p=full,c=bf16,o=f16",
]


def test_policy_equals_a_jmp_policy_of_the_same_dtypes_both_ways():
    assert isinstance(ours, jmp.Policy)
    assert ours == theirs
    assert theirs == ours
    assert (ours != theirs) is False
    assert (theirs != ours) is False
    assert hash(ours) == hash(theirs)
    assert len({ours, theirs}) == 1
    assert {theirs: 1}[ours] == {ours: 1}[theirs] == 1


def test_policy_equals_a_jmp_policy_written_with_dtype_objects():
    dtypes = map(np.dtype, ("float32", jnp.bfloat16, "float16"))
    assert ours == jmp.Policy(*dtypes)


@pytest.mark.parametrize("other", others, ids=repr)
def test_policy_differs_from_what_differs_both_ways(other):
    assert ours != other
    assert other != ours


def test_equal_policies_are_one_static_argument_of_jit():
    traces = []

    @jax.jit(static_argnums=0)
    def cast(policy, x):
        traces.append(policy)
        return policy.cast_to_compute(x)

    for policy in (ours, jaxmp.get_policy(str(ours)), jaxmp.get_policy(theirs)):
        assert cast(policy, jnp.ones(2)).dtype == jnp.bfloat16
    assert len(traces) == 1
    cast(ours.with_output_dtype("float32"), jnp.ones(2))
    assert len(traces) == 2


def test_get_policy_passes_a_jmp_policy_through():
    policy = jaxmp.get_policy(theirs)
    assert type(policy) is jaxmp.Policy
    assert policy == theirs
    assert jaxmp.get_policy(ours) is ours


# Defects of jmp 0.0.4 that are gone


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float16, np.float64])
def test_adjust_takes_a_scale_of_any_floating_dtype(dtype):
    # jmp: lax.select raises a TypeError, float32 against float16 (jmp#47).
    scale = jaxmp.DynamicLossScale(np.ones((), dtype) * 2**15, period=1)
    for finite, expected in ((True, 2**16), (True, 2**17), (False, 2**16)):
        scale = scale.adjust(jnp.bool_(finite))
        assert scale.loss_scale.dtype == jnp.float32
        assert float(scale.loss_scale) == expected


def test_a_half_loss_is_scaled_without_overflow(strict):
    # jmp: a scale of 2^16 given as a Python float makes a float16 loss infinite.
    for scale in (jaxmp.StaticLossScale(2**16), jaxmp.DynamicLossScale(2.0**16)):
        scaled = scale.scale(jnp.float16(3))
        assert scaled.dtype == jnp.float32
        assert float(scaled) == 3 * 2**16
        assert float(scale.unscale(scaled)) == 3


# jmp's tree_flatten leaves min_loss_scale out, so that each of these resets it to 1.
ROUND_TRIPS = {
    "tree_map": lambda scale: jax.tree.map(lambda x: x, scale),
    "jit": jax.jit(lambda scale: scale),
    "scan": lambda scale: jax.lax.scan(lambda c, _: (c, None), scale, length=2)[0],
    "cond": lambda scale: jax.lax.cond(True, lambda s: s, lambda s: s, scale),
    "device_put": jax.device_put,
    "eval_shape": lambda scale: jax.eval_shape(lambda s: s, scale),
    "adjust": lambda scale: scale.adjust(jnp.bool_(False)),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.parametrize("smallest", [0.25, np.float32(0.25), np.array(0.25)])
def test_min_loss_scale_survives(name, smallest):
    scale = jaxmp.DynamicLossScale(jnp.float32(1), min_loss_scale=smallest)
    survivor = ROUND_TRIPS[name](scale)
    assert survivor.min_loss_scale == 0.25
    assert isinstance(survivor.min_loss_scale, float)


def test_min_loss_scale_below_one_is_reached_under_jit():
    scale = jaxmp.DynamicLossScale(jnp.float32(1), min_loss_scale=0.25)
    adjust = jax.jit(lambda scale, finite: scale.adjust(finite))
    for expected in (0.5, 0.25, 0.25):
        scale = adjust(scale, False)
        assert float(scale.loss_scale) == expected
    assert adjust._cache_size() == 2  # NumPy scalars once, JAX arrays from then on


@pytest.mark.parametrize(
    "scale", [jaxmp.StaticLossScale(8), jaxmp.DynamicLossScale(8.0)]
)
def test_integers_pass_scale_and_unscale(scale, strict):
    # jmp: unscale makes a float of an integer, 3 -> 9.2e-5.
    key = jax.random.key(0)
    tree = {
        "int": jnp.int32(3),
        "bool": jnp.bool_(True),
        "key": key,
        "float0": np.zeros((), jax.dtypes.float0),
        "none": None,
        "python": 3,
        "float": jnp.float32(4),
    }
    for method, expected in ((scale.scale, 32), (scale.unscale, 0.5)):
        result = method(tree)
        assert float(result.pop("float")) == expected
        assert all(result[name] is tree[name] for name in result)


@pytest.mark.parametrize("make", [np.dtype, jnp.dtype, str, lambda dtype: dtype])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_str_of_a_policy_however_its_dtypes_are_written(make, dtype):
    # jmp: KeyError for a np.dtype.
    name = {"float32": "full", "float16": "f16"}[dtype]
    expected = f"p={name},c={name},o={name}"
    assert str(jaxmp.Policy(*3 * [make(dtype)])) == expected


@pytest.mark.parametrize("spec", ["p=f32, c=bf16", " p = f32 ,c= bf16 ", "\tc=bf16\n"])
def test_spaces_are_allowed_in_a_policy_string(spec):
    # jmp: ValueError.
    assert jaxmp.get_policy(spec) == jmp.get_policy("p=f32,c=bf16")


def test_abstract_leaves_are_cast():
    # jmp: passed over, so that eval_shape and a cast do not commute.
    struct = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    cast = ours.cast_to_compute({"w": struct})["w"]
    assert cast.dtype == jnp.bfloat16
    assert cast.shape == struct.shape


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8_leaves_stay_float8(dtype):
    # jmp: made float32 or half, whose size is four times or twice theirs.
    x = jnp.ones(2, dtype)
    for cast in (ours.cast_to_param, ours.cast_to_compute, jaxmp.cast_to_full):
        assert cast(x) is x
