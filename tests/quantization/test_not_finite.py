"""What is not finite stays so: no format hides an overflow from a loss scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.policy.quantize import RECIPES
from jaxmp.quantization.matmul import multiply
from jaxmp.quantization.recipe import ACTIVATION, WEIGHT, recipe_of

NUMBERS = (((1,), (0,)), ((), ()))
KEYS = jax.random.split(jax.random.key(0), 3)
# Every number of a product takes part in others: none is zero.
X, W, D = (
    jnp.sign(x) * (jnp.abs(x) + 0.1)
    for x in (
        jax.random.normal(KEYS[0], (6, 16), jnp.bfloat16),
        jax.random.normal(KEYS[1], (16, 5), jnp.bfloat16),
        jax.random.normal(KEYS[2], (6, 5), jnp.bfloat16),
    )
)
recipes = pytest.mark.parametrize("name", RECIPES)
bads = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


def with_gradients(name, x, w, cotangent):
    recipe = recipe_of(name)
    roles = ACTIVATION, WEIGHT
    out, pull_back = jax.vjp(lambda x, w: multiply(x, w, NUMBERS, recipe, roles), x, w)
    return out, *pull_back(cotangent)


def is_finite(x):
    return np.isfinite(np.asarray(x, np.float32))


@recipes
@bads
@dtypes
def test_a_result_is_not_finite_where_an_operand_of_it_is_not(name, bad, dtype):
    x, w, d = (a.astype(dtype) for a in (X, W, D))
    run = jax.jit(with_gradients, static_argnums=0)
    assert all(np.all(is_finite(a)) for a in run(name, x, w, d))
    # In the activation: its row, and the gradients of the weights it is multiplied by.
    out, _, to_w = run(name, x.at[2, 3].set(bad), w, d)
    assert not np.any(is_finite(out[2]))
    assert not np.any(is_finite(to_w[3]))
    # In the weight: its column, and the gradients of what it was multiplied by.
    out, to_x, _ = run(name, x, w.at[3, 1].set(bad), d)
    assert not np.any(is_finite(out[:, 1]))
    assert not np.any(is_finite(to_x[:, 3]))
    # In the cotangent: what its row and its column are multiplied into.
    out, to_x, to_w = run(name, x, w, d.at[2, 1].set(bad))
    assert np.all(is_finite(out))
    assert not np.any(is_finite(to_x[2]))
    assert not np.any(is_finite(to_w[:, 1]))


@recipes
def test_a_zero_hides_nothing(name):
    """A factor of zero makes an infinity NaN, and no number of it."""
    out, _, _ = with_gradients(name, X.at[2, 3].set(jnp.inf), W * 0, D)
    assert not np.any(is_finite(out[2]))
    _, to_x, to_w = with_gradients(name, X * 0, W, D.at[2, 1].set(jnp.nan))
    assert not np.any(is_finite(to_x[2]))
    assert not np.any(is_finite(to_w[:, 1]))


@recipes
@pytest.mark.parametrize("place", ["batch", "backward pass"])
def test_a_step_that_overflows_is_skipped(name, place):
    policy = f"p=f32,c=f16,quantize={name}"
    tx = jaxmp.loss_scaling(optax.sgd(0.1), policy)
    x = jax.random.normal(KEYS[0], (16, 16))
    params = [jax.random.normal(key, (16, 16)) / 4 for key in KEYS]

    def loss(params, x, factor):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x) * factor

    @jax.jit
    def step(params, state, x, factor):
        fn = jaxmp.autocast(loss, policy)
        value_and_grad = jaxmp.value_and_grad(fn)
        value, gradients = value_and_grad(params, x, factor, loss_scale=state)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    before = tx.init(params)
    after, state, value = step(params, before, x, 1e-2)
    assert np.isfinite(value)
    assert all(np.any(a != b) for a, b in zip(after, params, strict=True))
    assert jaxmp.get_loss_scale(state) == jaxmp.get_loss_scale(before)
    bad = (x.at[3, 4].set(jnp.inf), 1.0) if place == "batch" else (x, 1e6)
    after, state, value = step(params, before, *bad)
    assert all(np.array_equal(a, b) for a, b in zip(after, params, strict=True))
    assert jaxmp.get_loss_scale(state) < jaxmp.get_loss_scale(before)
