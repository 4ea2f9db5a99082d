"""`cast_for_eval` and `cast_like`: variables in half for serving, and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp.modules import cast_like


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(8)(x))
        return nn.Dense(2, name="head")(x)


@pytest.fixture(scope="module")
def variables():
    return Net().init(jax.random.key(0), jnp.ones((1, 4)))


def dtypes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(x.dtype)
        for path, x in leaves
    }


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_parameters_are_cast_once_and_norms_and_statistics_are_not(variables, half):
    cast = dtypes(jaxmp.cast_for_eval(variables, f"mixed_{half}"))
    assert cast.pop("params/norm/scale") == cast.pop("params/norm/bias") == "float32"
    assert cast.pop("batch_stats/norm/mean") == "float32"
    assert cast.pop("batch_stats/norm/var") == "float32"
    assert set(cast.values()) == {half}


def test_parameters_alone_are_cast_as_in_their_collection(variables):
    alone = jaxmp.cast_for_eval(variables["params"], "mixed_bfloat16")
    whole = jaxmp.cast_for_eval(variables, "mixed_bfloat16")
    assert dtypes(alone) == dtypes(whole["params"])


def test_the_forward_pass_is_that_of_the_mixed_policy(variables):
    x = jax.random.normal(jax.random.key(1), (16, 4))
    model = jaxmp.apply_policy(Net(), "mixed_bfloat16")
    half = jaxmp.cast_for_eval(variables, "mixed_bfloat16")
    np.testing.assert_array_equal(model.apply(half, x), model.apply(variables, x))


def test_a_bound_module_is_cast_with_its_variables(variables):
    bound = jaxmp.cast_for_eval(Net().bind(variables), "mixed_float16")
    assert bound.variables["params"]["head"]["kernel"].dtype == jnp.float16
    assert bound(jnp.ones((1, 4))).dtype == jnp.float32


def test_an_nnx_module_is_cast_and_left_as_it_was():
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.LayerNorm(8, rngs=nnx.Rngs(0))
    )
    half = jaxmp.cast_for_eval(model, "mixed_bfloat16")
    assert half.layers[0].kernel.dtype == jnp.bfloat16
    assert half.layers[1].scale.dtype == jnp.float32
    assert model.layers[0].kernel.dtype == jnp.float32
    assert half(jnp.ones((1, 4))).dtype == jnp.float32


def test_rules_by_path_apply_to_variables(variables):
    rules = (*jaxmp.head_in_float32("head"), *jaxmp.default_rules)
    cast = dtypes(jaxmp.cast_for_eval(variables, "mixed_bfloat16", rules=rules))
    assert cast["params/head/kernel"] == "float32"
    assert cast["params/Dense_0/kernel"] == "bfloat16"


def test_half_to_float32_is_exact_and_back_again(variables):
    half = jaxmp.cast_for_eval(variables, "mixed_float16")
    wide, rounded = cast_like(half, variables)
    assert rounded == {}
    again, rounded = cast_like(wide, half)
    assert rounded == {}
    jax.tree.map(np.testing.assert_array_equal, again, half)


def test_rounding_is_told_by_path_with_its_size():
    saved = {"a": jnp.float32(0.1), "b": jnp.float32(0.5), "n": jnp.int32(3)}
    like = {"a": jnp.float16(0), "b": jnp.float16(0), "n": jnp.int32(0)}
    _, rounded = cast_like(saved, like)
    assert rounded.keys() == {"a"}
    assert 0 < rounded["a"] <= 2**-11


def test_overflow_is_told_as_infinite():
    _, rounded = cast_like({"a": jnp.float32(1e6)}, {"a": jnp.float16(0)})
    assert rounded["a"] == float("inf")
