"""`cast_for_eval` and `cast_like`: variables in half for serving, and back."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp import PolicyRule, default_rules
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


# Pytrees that Flax knows nothing of


class Block(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    rest: list
    calls: jax.Array

    def __init__(self):
        key = jax.random.key(0)
        self.linear = eqx.nn.Linear(4, 4, key=key)
        self.norm = eqx.nn.LayerNorm(4)
        self.rest = [eqx.nn.MLP(4, 2, 8, 1, key=key), eqx.nn.RMSNorm(2), jax.nn.relu]
        self.calls = jnp.int32(3)

    def __call__(self, x):
        x = self.norm(self.linear(x)).astype(x.dtype)
        mlp, norm, activation = self.rest
        return activation(norm(mlp(x)))


@dataclasses.dataclass
class Weights:
    a: jax.Array
    name: str


jax.tree_util.register_dataclass(Weights, ["a"], ["name"])


def dtypes_of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.dtype.name
        for path, x in leaves
        if hasattr(x, "dtype")
    }


def test_an_equinox_module_is_cast_and_its_norms_are_not():
    block = Block()
    half = jaxmp.cast_for_eval(block, "mixed_bfloat16")
    assert isinstance(half, Block)
    found = dtypes_of(half)
    for path, dtype in found.items():
        expected = "float32" if "norm" in path or path.startswith("rest/1") else None
        expected = "int32" if path == "calls" else expected
        assert dtype == (expected or "bfloat16"), path
    assert {"linear/weight", "rest/0/layers/1/bias", "rest/1/weight"} <= found.keys()
    x = jnp.linspace(-1.0, 1.0, 4)
    assert half(x.astype(jnp.bfloat16)).shape == (2,)
    assert dtypes_of(block)["linear/weight"] == "float32"


def test_rules_by_path_apply_to_any_pytree():
    rules = (PolicyRule(path="rest/0/.*", params="float32"), *default_rules)
    found = dtypes_of(jaxmp.cast_for_eval(Block(), "mixed_float16", rules=rules))
    assert found["rest/0/layers/1/bias"] == "float32"
    assert found["linear/weight"] == "float16"


def test_so_do_dataclasses_lists_and_the_parameters_of_haiku():
    tree = [Weights(jnp.ones(2), "a"), (jnp.float32(1), None), jax.random.key(0)]
    cast = jaxmp.cast_for_eval(tree, "mixed_bfloat16")
    assert cast[0].a.dtype == cast[1][0].dtype == jnp.bfloat16
    assert cast[0].name == "a"
    haiku = {
        "mlp/~/linear_0": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)},
        "mlp/~/layer_norm": {"scale": jnp.ones(2), "offset": jnp.ones(2)},
    }
    cast = jaxmp.cast_for_eval(haiku, "mixed_bfloat16")
    assert cast["mlp/~/linear_0"]["w"].dtype == jnp.bfloat16
    assert cast["mlp/~/layer_norm"]["offset"].dtype == jnp.float32
    assert jaxmp.cast_for_eval(jnp.ones(2), "mixed_float16").dtype == jnp.float16
