"""Whole loops: scans, ensembles, several losses, accumulation, micro-precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp

XS = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4, 8)), jnp.float32)


def loss_fn(w, x):
    """Linear regression on the mean of the batch, multiplied in float16."""
    predicted = x.astype(jnp.float16) @ w.astype(jnp.float16)
    return jnp.mean((predicted.astype(jnp.float32) - jnp.mean(x, axis=1)) ** 2)


TX = jaxmp.loss_scaling(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "mixed_float16",
    growth_interval=3,
    init_scale=2.0**8,
    max_scale=2.0**10,
)


def step(carry, x):
    w, state = carry
    loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
    updates, state = TX.update(grads, state, w, value=loss)
    return (optax.apply_updates(w, updates), state), loss


def with_bad_batch(xs, *indices):
    return xs.at[jnp.array(indices), 0, 0].set(jnp.nan)


def assert_same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def test_scan_over_steps_is_the_loop():
    xs = with_bad_batch(XS, 4, 9)
    w = jnp.zeros(8)
    scanned, losses = jax.jit(functools.partial(jax.lax.scan, step))(
        (w, TX.init(w)), xs
    )
    carry, jitted = (w, TX.init(w)), jax.jit(step)
    for x, expected in zip(xs, losses, strict=True):
        carry, loss = jitted(carry, x)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert jitted._cache_size() == 1
    np.testing.assert_allclose(scanned[0], carry[0], rtol=1e-5)
    assert_same(scanned[1]._replace(inner_state=()), carry[1]._replace(inner_state=()))
    assert (int(scanned[1].applied_steps), int(scanned[1].skipped_steps)) == (10, 2)


def test_every_member_of_an_ensemble_skips_alone():
    """The bad batches of one member leave the others bit-identical."""
    members = jnp.stack([XS, with_bad_batch(XS, 2, 7), XS * 2])
    ws = jnp.zeros((3, 8))

    @jax.jit
    def train(ws, batches):
        states = jax.vmap(TX.init)(ws)
        scan = functools.partial(jax.lax.scan, step)
        return jax.vmap(scan)((ws, states), batches)[0]

    trained, states = train(ws, members)
    undisturbed, _ = train(ws, jnp.stack([XS, XS, XS * 2]))
    np.testing.assert_array_equal(trained[0], undisturbed[0])
    np.testing.assert_array_equal(trained[2], undisturbed[2])
    assert (trained[1] != undisturbed[1]).any()
    assert states.skipped_steps.tolist() == [0, 2, 0]
    assert states.applied_steps.tolist() == [12, 10, 12]
    assert states.loss_scale.tolist() == [2.0**10, 2.0**8, 2.0**10]


def test_two_losses_and_two_optimizers_in_one_step_each_with_its_scale():
    """A step like a GAN's: the discriminator overflows, the generator steps."""
    generator_tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")
    discriminator_tx = jaxmp.loss_scaling(
        optax.sgd(0.1), "mixed_float16", init_scale=2.0**10
    )

    def fake(g, z):
        return (g.astype(jnp.float16) * z.astype(jnp.float16)).astype(jnp.float32)

    def d_loss_fn(d, g, z, x):
        return jnp.mean(jax.nn.softplus(d * fake(g, z)) + jax.nn.softplus(-d * x))

    def g_loss_fn(g, d, z):
        return jnp.mean(jax.nn.softplus(-d * fake(g, z)))

    @jax.jit
    def gan_step(g, d, g_state, d_state, z, x):
        d_loss, d_grads = jaxmp.value_and_grad(d_loss_fn)(
            d, g, z, x, loss_scale=d_state
        )
        g_loss, g_grads = jaxmp.value_and_grad(g_loss_fn)(g, d, z, loss_scale=g_state)
        d_updates, d_state = discriminator_tx.update(d_grads, d_state, d, value=d_loss)
        g_updates, g_state = generator_tx.update(g_grads, g_state, g, value=g_loss)
        return (
            optax.apply_updates(g, g_updates),
            optax.apply_updates(d, d_updates),
            g_state,
            d_state,
        )

    g, d, z = jnp.ones(4), jnp.ones(4), jnp.linspace(0.1, 1.0, 4)
    state = (g, d, generator_tx.init(g), discriminator_tx.init(d))
    new = gan_step(*state, z, jnp.ones(4) * jnp.nan)
    assert (new[0] != g).all()
    np.testing.assert_array_equal(new[1], d)
    assert (int(new[2].applied_steps), int(new[3].skipped_steps)) == (1, 1)
    assert (float(new[2].loss_scale), float(new[3].loss_scale)) == (2.0**16, 2.0**9)
    expected = jax.grad(g_loss_fn)(g, d, z)
    actual = jaxmp.grad(g_loss_fn)(g, d, z, loss_scale=state[2])
    np.testing.assert_allclose(actual, expected, rtol=2e-3)
    new = gan_step(*new, z, jnp.ones(4))
    assert int(new[3].applied_steps) == 1
    assert gan_step._cache_size() == 1


def test_several_losses_of_one_optimizer_add_up():
    state = TX.init(jnp.zeros(8))
    w = jnp.ones(8)
    first = jaxmp.grad(loss_fn)(w, XS[0], loss_scale=state)
    second = jaxmp.grad(lambda w: 0.1 * jnp.sum(w**2))(w, loss_scale=state)
    both = jaxmp.grad(lambda w: loss_fn(w, XS[0]) + 0.1 * jnp.sum(w**2))(
        w, loss_scale=state
    )
    np.testing.assert_allclose(first + second, both, rtol=1e-5)


def test_gradient_accumulation_by_hand_has_one_decision_per_window():
    def window_step(carry, window):
        w, state = carry

        def accumulate(total, x):
            _, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
            return total + grads / len(window), None

        grads, _ = jax.lax.scan(accumulate, jnp.zeros_like(w), window)
        updates, state = TX.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    windows = with_bad_batch(XS, 5).reshape(3, 4, 4, 8)
    w = jnp.full(8, 0.5)
    scan = functools.partial(jax.lax.scan, window_step)
    (_, state), _ = jax.jit(scan)((w, TX.init(w)), windows)
    assert (int(state.applied_steps), int(state.skipped_steps)) == (2, 1)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_one_string_changes_the_scale_and_nothing_else(policy):
    tx = jaxmp.loss_scaling(optax.adam(0.02), policy)

    def step(carry, x):
        w, state = carry
        loss, grads = jaxmp.value_and_grad(loss_fn)(w, x, loss_scale=state)
        updates, state = tx.update(grads, state, w, value=loss)
        return (optax.apply_updates(w, updates), state), loss

    w = jnp.zeros(8)
    carry = jax.jit(functools.partial(jax.lax.scan, step))
    (trained, state), losses = carry((w, tx.init(w)), jnp.tile(XS, (24, 1, 1)))
    assert losses[-12:].mean() < 0.1 * losses[:12].mean()
    np.testing.assert_allclose(trained, 1 / 8, atol=0.03)
    expected = 2.0**16 if policy == "mixed_float16" else 1.0
    assert 0.25 * expected <= float(state.loss_scale) <= expected
