"""A loss that is made inside a float16 model does not cost the first step."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp
from jaxmp.loss_scale._float16_losses import was_float16

X = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4).astype(jnp.float16)


class WithLoss(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.mean(nn.Dense(2, dtype=jnp.float16)(x) ** 2)


def half_loss(w):
    return jnp.mean((X @ w.astype(jnp.float16)) ** 2)


def penalty(w):
    return 1e-3 * jnp.sum(w**2)


LOSSES = {
    "cast outside": lambda w: half_loss(w).astype(jnp.float32),
    "float16": half_loss,
    "with a penalty": lambda w: half_loss(w).astype(jnp.float32) + penalty(w),
    "less a penalty": lambda w: -(penalty(w) - half_loss(w).astype(jnp.float32)),
    "jitted": lambda w: jax.jit(half_loss)(w).astype(jnp.float32),
    "cast in a jit": jax.jit(
        lambda w: jax.jit(half_loss)(w).astype(jnp.float32).reshape(1)[0]
    ),
    "rematerialised": jax.checkpoint(lambda w: half_loss(w).astype(jnp.float32)),
    "an unreduced sum": lambda w: jnp.sum(
        ((X @ w.astype(jnp.float16)) ** 2 / 16).astype(jnp.float32)
    ),
    "through bfloat16": lambda w: half_loss(w).astype(jnp.bfloat16),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("jit", [False, True])
def test_the_first_step_is_applied_and_gradients_stay_true(name, jit):
    w = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16", init_scale=2.0**16)
    state = tx.init(w)

    def step(w, state):
        loss, grads = jaxmp.value_and_grad(LOSSES[name])(w, loss_scale=state)
        return grads, tx.update(grads, state, w, value=loss)[1]

    grads, state = (jax.jit(step) if jit else step)(w, state)
    assert int(state.applied_steps) == 1
    assert float(state.loss_scale) == 2.0**16
    np.testing.assert_allclose(grads, jax.grad(LOSSES[name])(w), rtol=1e-2, atol=1e-4)


def test_flax_and_equinox_and_micro_batches_too():
    model = WithLoss()
    params = model.init(jax.random.key(0), X)
    scale = jaxmp.StaticLossScale(2.0**20)

    def loss_fn(params, x):
        return model.apply(params, x).astype(jnp.float32)

    for kwargs in ({}, {"micro_batches": 2}):
        step = jax.jit(jaxmp.value_and_grad(loss_fn, **kwargs))
        assert jaxmp.all_finite(step(params, X, loss_scale=scale))
    linear = nnx.Linear(4, 2, dtype=jnp.float16, rngs=nnx.Rngs(0))
    equinox = eqx.nn.Linear(4, 2, key=jax.random.key(0))

    def of_nnx(model):
        return jnp.mean(model(X) ** 2).astype(jnp.float32)

    def of_equinox(model):
        half = jax.tree.map(lambda p: p.astype(jnp.float16), model)
        return jnp.mean(jax.vmap(half)(X) ** 2).astype(jnp.float32)

    for fun, model, transform in (
        (of_nnx, linear, nnx.value_and_grad),
        (of_equinox, equinox, eqx.filter_value_and_grad),
    ):
        step = jaxmp.value_and_grad(fun, transform=transform)
        assert jaxmp.all_finite(step(model, loss_scale=scale))


@pytest.mark.parametrize(
    "fun",
    [
        lambda w: jnp.mean((w.astype(jnp.float16) * 2).astype(jnp.float32) ** 2),
        lambda w: jnp.sum((w.astype(jnp.float16) * 2).astype(jnp.float32) * 0.5),
        lambda w: jnp.sum(w**2),
        lambda w: jnp.sum(w.astype(jnp.bfloat16)).astype(jnp.float32),
    ],
)
def test_a_loss_whose_float16_part_gets_another_cotangent_keeps_the_scale(fun):
    seen = []

    def noted(w):
        loss = fun(w)
        seen.append(was_float16(loss))
        return loss

    jax.grad(noted)(jnp.ones(4))
    jax.jit(jax.grad(noted))(jnp.ones(4))
    assert seen == [False, False]
    assert not was_float16(jnp.float32(1))
