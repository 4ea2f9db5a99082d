"""Trainers that differentiate themselves: the two lines that the page shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp

W = {"w": jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)}
X = jnp.linspace(-2.0, 2.0, 32).reshape(8, 4)


def loss_fn(params, x):
    half = x.astype(jnp.float16) @ params["w"].astype(jnp.float16)
    return 1e-6 * jnp.mean(half.astype(jnp.float32) ** 2)  # lost without a scale


def expected_grads():
    return jax.grad(lambda p: 1e-6 * jnp.mean((X @ p["w"]) ** 2))(W)


def scale_by_hand(state):
    return jax.grad(lambda p: jaxmp.scale_loss(loss_fn(p, X), state))(W)


def pmapped(state):
    @functools.partial(jax.pmap, axis_name="i", in_axes=(None, 0))
    def grads_of(state, x):
        grads = jaxmp.grad(loss_fn)(W, x[None], loss_scale=state)
        return jax.lax.pmean(grads, "i")

    return jax.tree.map(lambda g: g[0], grads_of(state, X))


def pmapped_by_hand(state):
    @functools.partial(jax.pmap, axis_name="i", in_axes=(None, 0))
    def grads_of(state, x):
        def scaled(params):
            return jaxmp.scale_loss(loss_fn(params, x[None]), state)

        return jax.lax.pmean(jax.grad(scaled)(W), "i")

    return jax.tree.map(lambda g: g[0], grads_of(state, X))


def per_example(state):
    def example_grad(x):
        return jaxmp.grad(loss_fn)(W, x[None], loss_scale=state)

    grads = jax.vmap(example_grad)(X)
    assert grads["w"].shape == (8, 4, 2)
    return jax.tree.map(lambda g: g.mean(0), grads)


def accumulated(state):
    def add(total, x):
        grads = jaxmp.grad(loss_fn)(W, x[None], loss_scale=state)
        return jax.tree.map(jnp.add, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, W)
    total, _ = jax.lax.scan(add, zeros, X)
    return jax.tree.map(lambda g: g / 8, total)


TRAINERS = {
    "by hand": (scale_by_hand, True),
    "pmap": (pmapped, False),
    "pmap by hand": (pmapped_by_hand, True),
    "per example": (per_example, False),
    "accumulated by hand": (accumulated, False),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.devices(8 if "pmap" in name else 1))
        for name in TRAINERS
    ],
)
def test_what_float16_would_lose_arrives(name):
    grads_of, by_hand = TRAINERS[name]
    tx = jaxmp.loss_scaling(optax.sgd(1.0), "mixed_float16", grads_are_scaled=by_hand)
    state = tx.init(W)
    updates, state = tx.update(grads_of(state), state, W)
    expected = expected_grads()["w"]
    assert int(state.applied_steps) == 1
    np.testing.assert_allclose(-updates["w"], expected, rtol=2e-2, atol=1e-9)
    plain = jax.grad(loss_fn)(W, X)["w"]
    assert np.abs(plain - expected).max() > 0.05 * np.abs(expected).max()


def test_differential_privacy_clips_true_gradients():
    tx = optax.contrib.differentially_private_aggregate(1e-6, 0.0, 0)
    tx = jaxmp.loss_scaling(optax.chain(tx, optax.sgd(1.0)), "mixed_float16")

    @jax.jit
    def step(state):
        def example_grad(x):
            return jaxmp.grad(loss_fn)(W, x[None], loss_scale=state)

        return tx.update(jax.vmap(example_grad)(X), state, W)

    updates, state = step(tx.init(W))
    assert int(state.applied_steps) == 1
    norm = float(optax.tree_utils.tree_norm(updates))
    assert 0 < norm <= 1e-6 * (1 + 1e-3)
