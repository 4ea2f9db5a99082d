"""Training under a policy that quantises: gradients, steps, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxmp
from jaxmp.policy.quantize import RECIPES

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 64))
W = jax.random.normal(KEY, (3, 64, 64)) / 8
POLICIES = tuple(f"mixed_{name}" for name in RECIPES)


def loss(w, x):
    return jnp.square(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[2]).mean()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_of_a_scaled_loss_has_the_same_digits(policy):
    fn = jaxmp.autocast(loss, policy)
    gradient = jax.jit(jax.grad(lambda w, scale: fn(w, X) * scale))
    expected = gradient(W, jnp.float32(1))
    for power in (-20, -7, 3, 20):
        scale = jnp.float32(2.0**power)
        assert np.array_equal(gradient(W, scale) / scale, expected)


@pytest.mark.parametrize("loop", ["Python", "scan"])
def test_gradients_of_a_weight_that_is_used_often_are_added_up_in_float32(loop):
    # 300 equal terms stop growing at 256 of them in bfloat16.
    w, ones = jnp.ones((16, 16)), jnp.ones((16, 16))

    def fn(w):
        def step(total, _):
            return total + (ones @ w).mean(), None

        if loop == "scan":
            total, _ = lax.scan(step, 0.0, None, length=300)
        else:
            total = sum(step(0.0, None)[0] for _ in range(300))
        return (total * jnp.eye(16)) @ ones

    rules = [jaxmp.casting.OpRule(function="step", quantize="fp8")]
    cast_fn = jaxmp.autocast(fn, "mixed_fp8", rules=rules)
    assert str(jax.make_jaxpr(cast_fn)(w)).count("scaled_dot[") >= 1
    found = jax.grad(lambda w: cast_fn(w).mean())(w)
    expected = jax.grad(lambda w: fn(w).mean())(w)
    np.testing.assert_allclose(found, expected, rtol=2e-2)


def test_reduce_in_float32_returns_the_gradients_of_weights_in_float32():
    def low_bits(policy):
        grads = jax.grad(jaxmp.autocast(loss, policy))(W, X)
        return np.asarray(grads).view(np.uint32) & 0xFFFF

    assert not low_bits("mixed_fp8").any()
    assert low_bits("mixed_fp8,reduce=float32")[0].any()


def test_float16_is_added_up_and_scaled_in_float32():
    # The products of values in e4m3 reach 448 * 448, beyond float16, before the scales.
    w = jnp.full((2, 64, 64), 2.0**-6)
    fn = jaxmp.autocast(lambda w, x: x @ w[0] @ w[1], "p=f32,c=f16,o=f32,quantize=fp8")
    out = jax.jit(fn)(w, jnp.full((32, 64), 1.75))
    np.testing.assert_array_equal(out, 1.75)


def test_a_step_has_no_state_and_is_compiled_once():
    tx = jaxmp.loss_scaling(optax.adam(1e-2), "mixed_fp8")
    fn = jaxmp.autocast(loss, "mixed_fp8")

    @jax.jit
    def step(w, state, x):
        value, grads = jaxmp.value_and_grad(fn)(w, x, loss_scale=state)
        updates, state = tx.update(grads, state, w, value=value)
        return optax.apply_updates(w, updates), state, value

    w, state, first = step(W, tx.init(W), X)
    for _ in range(10):
        w, state, value = step(w, state, X)
    assert step._cache_size() == 1
    assert value < first
    before = w
    w, state, _ = step(w, state, X.at[0, 0].set(jnp.inf))
    assert np.array_equal(w, before)
    assert jaxmp.loss_scale_metrics(state)["skipped_steps"] == 1


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_policies_of_checkpoint_know_a_quantised_matmul(where):
    save = jax.checkpoint_policies.dots_saveable
    bare = jaxmp.autocast(loss, "mixed_fp8")

    def count(policy):
        if where == "inside":
            kept = jax.checkpoint(loss, policy=policy)
            fn = jaxmp.autocast(kept, "mixed_fp8")
        else:
            fn = jax.checkpoint(bare, policy=policy)
        return str(jax.make_jaxpr(jax.grad(fn))(W, X)).count("scaled_dot[")

    plain = str(jax.make_jaxpr(jax.grad(bare))(W, X)).count("scaled_dot[")
    assert count(save) == plain
    assert count(None) > plain
