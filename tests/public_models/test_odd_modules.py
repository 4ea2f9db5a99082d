"""Modules that are odd, and public: bridges, attributes of their own, other dtypes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import jaxmp

from .measures import HALF, POLICIES, matmuls

X = np.linspace(-1, 1, 4 * 16, dtype=np.float32).reshape(4, 16)
policies = pytest.mark.parametrize("policy", POLICIES)


def half_matmuls(function: Any, *args: Any) -> float:
    return matmuls(jax.make_jaxpr(function)(*args)).share


def half_matmuls_of_nnx(model: nnx.Module) -> float:
    graph, state = nnx.split(model)
    return half_matmuls(lambda state, x: nnx.merge(graph, state)(x), state, X)


class Inner(nnx.Module):
    def __init__(self, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 32, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(32, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Outer(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = bridge.ToLinen(Inner, args=(16,), kwargs={"dtype": self.dtype})(x)
        return nn.Dense(8, dtype=self.dtype)(x)


@policies
def test_an_nnx_module_within_a_linen_one(policy):
    variables = Outer().init(jax.random.key(0), X)
    model = jaxmp.apply_policy(Outer(), policy)
    assert half_matmuls(model.apply, variables, X) == 1
    output = model.apply(variables, X)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, Outer().apply(variables, X), atol=0.05)


@policies
def test_a_linen_module_within_an_nnx_one(policy):
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            layer = bridge.ToNNX(nn.Dense(32, dtype=jnp.float32), rngs=rngs)
            self.up = layer.lazy_init(X)
            self.down = nnx.Linear(32, 8, dtype=jnp.float32, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    plain = Model(nnx.Rngs(0))
    model = jaxmp.apply_policy(plain, policy)
    assert half_matmuls_of_nnx(model) == 1
    assert model(X).dtype == jnp.float32
    np.testing.assert_allclose(model(X), plain(X), atol=0.05)


class Registry(nn.Module):
    """Finds its layers by attribute, whatever is asked for."""

    dtype: Any = jnp.float32

    def setup(self):
        self.layers = {
            name: nn.Dense(16, dtype=self.dtype) for name in ("first", "second")
        }

    def __getattr__(self, name: str) -> Any:
        if name in ("first", "second"):
            return self.layers[name]
        return super().__getattr__(name)

    def __call__(self, x):
        return self.second(nn.relu(self.first(x)))


@policies
def test_a_linen_module_with_its_own_getattr(policy):
    variables = Registry().init(jax.random.key(0), X)
    model = jaxmp.apply_policy(Registry(), policy)
    assert half_matmuls(model.apply, variables, X) == 1
    expected = Registry().apply(variables, X)
    np.testing.assert_allclose(model.apply(variables, X), expected, atol=0.05)
    with pytest.raises(AttributeError, match="third"):
        _ = model.third


class Odd(nnx.Module):
    """Its `param_dtype` is no dtype: the parameters' names by kind."""

    def __init__(self, rngs: nnx.Rngs):
        self.param_dtype = {"kernel": "matrix", "bias": "vector"}
        self.dtype = "of the letters: Latin"
        self.linear = nnx.Linear(16, 16, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x):
        assert self.param_dtype["bias"] == "vector"
        assert self.dtype.endswith("Latin")
        return self.linear(x)


@policies
def test_an_nnx_layer_whose_dtypes_are_something_else(policy):
    plain = Odd(nnx.Rngs(0))
    model = jaxmp.apply_policy(plain, policy)
    assert half_matmuls_of_nnx(model) == 1
    np.testing.assert_allclose(model(X), plain(X), atol=0.05)
    assert model.param_dtype == plain.param_dtype


@policies
def test_a_model_that_is_half_already_stays_so(policy):
    """Its author wrote half by hand; the policy finds nothing left to do."""
    dtype = jnp.dtype(policy.removeprefix("mixed_"))
    plain = nn.Dense(8, dtype=dtype)
    variables = plain.init(jax.random.key(0), X)
    model = jaxmp.apply_policy(plain, policy)
    assert half_matmuls(model.apply, variables, X) == 1
    assert plain.apply(variables, X).dtype.name in HALF
    assert model.apply(variables, X).dtype == jnp.float32
