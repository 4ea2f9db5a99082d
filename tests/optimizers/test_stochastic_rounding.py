"""Half weights that train alone, and the average of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import MissingParams, MissingState, OptimizerOptionError
from jaxmp.optimizers import ema, get_ema, master_weights, stochastic_rounding

# What is exact has to be so with LLVM's optimisation.
pytestmark = pytest.mark.optimised
HALF = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def run(tx, params, grads, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=steps)[0]
    )(params)


@HALF
def test_small_steps_are_kept_on_average(dtype):
    params = jnp.ones(4096, dtype)
    tx = stochastic_rounding(optax.sgd(1e-4), seed=0)
    params, state = run(tx, params, jnp.ones(4096), 200)
    assert params.dtype == dtype
    assert float(params.astype(jnp.float32).mean()) == pytest.approx(0.98, abs=2e-3)
    assert state.draws == 200


@HALF
def test_zero_updates_change_no_bit(dtype):
    params = jnp.asarray([1.5, -0.0, 0.0, -3.0], dtype)
    after, _ = run(stochastic_rounding(optax.sgd(1.0), seed=0), params, jnp.zeros(4), 5)
    np.testing.assert_array_equal(
        np.asarray(after).view(np.uint16), np.asarray(params).view(np.uint16)
    )


@HALF
def test_updates_land_on_a_neighbour_of_the_exact_sum(dtype):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=4096), dtype)
    grads = jnp.asarray(rng.normal(size=4096), jnp.float32)
    tx = stochastic_rounding(optax.sgd(0.1), seed=0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    exact = np.asarray(params, np.float64) - 0.1 * np.asarray(grads, np.float64)
    last_place = np.ldexp(1.0, np.frexp(exact)[1] - 1 - jnp.finfo(dtype).nmant)
    assert (np.abs(np.asarray(after, np.float64) - exact) < 1.001 * last_place).all()


def test_the_seed_and_the_count_are_the_random_state():
    params, grads = jnp.ones(512, jnp.bfloat16), jnp.ones(512)

    def two_steps(seed, interrupted):
        tx = stochastic_rounding(optax.sgd(1e-3), seed=seed)
        p, state = run(tx, params, grads, 1)
        if interrupted:
            state = state._replace(draws=jnp.int32(7))
        updates, _ = tx.update(grads, state, p)
        return np.asarray(optax.apply_updates(p, updates)).view(np.uint16)

    np.testing.assert_array_equal(two_steps(0, False), two_steps(0, False))
    assert (two_steps(0, False) != two_steps(1, False)).any()
    assert (two_steps(0, False) != two_steps(0, True)).any()


def test_leaves_do_not_share_random_bits():
    params = {"a": jnp.ones(512, jnp.bfloat16), "b": jnp.ones(512, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    params, _ = run(stochastic_rounding(optax.sgd(1e-3), seed=0), params, grads, 1)
    assert (params["a"] != params["b"]).any()


def test_float32_parameters_get_the_update_as_it_is():
    params = {"norm": jnp.ones(2), "w": jnp.ones(2, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    params, _ = run(stochastic_rounding(optax.sgd(1e-4), seed=0), params, grads, 1)
    assert params["norm"].tolist() == [np.float32(1) - np.float32(1e-4)] * 2


def test_without_parameters_the_error_shows_the_call():
    tx = stochastic_rounding(optax.sgd(0.1), seed=0)
    with pytest.raises(MissingParams, match=r"stochastic_rounding.*tx.update\(grads"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


# The average of weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_moving_average_is_float32_whatever_the_weights_are(dtype):
    tx = optax.chain(optax.identity(), ema(0.9999))
    params = jnp.zeros(3, dtype)
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates, state = update(jnp.ones(3, dtype), state, params)
    params = params + updates.astype(dtype)
    for _ in range(1999):
        _, state = update(jnp.zeros(3, dtype), state, params)
    shadow = optax.tree_utils.tree_get(state, "shadow")
    assert shadow.dtype == jnp.float32
    np.testing.assert_allclose(shadow, 1 - 0.9999**2000, rtol=1e-4)
    assert get_ema(state, params).dtype == dtype


def test_inside_of_master_weights_it_averages_the_masters():
    tx = master_weights(optax.chain(optax.sgd(1e-4), ema(0.5)))
    _, state = run(tx, jnp.ones(2, jnp.bfloat16), jnp.ones(2), 3)
    expected = 1.0
    for i in 1, 2, 3:
        expected = 0.5 * expected + 0.5 * (1 - 1e-4 * i)
    np.testing.assert_allclose(get_ema(state, jnp.ones(2)), expected, rtol=1e-6)


def test_a_skip_leaves_the_average():
    tx = jaxmp.loss_scaling(optax.chain(optax.sgd(1.0), ema(0.5)), "mixed_float16")
    params = jnp.ones(2)
    state = tx.init(params)
    _, state = tx.update(jnp.full(2, jnp.inf), state, params)
    assert get_ema(state, params).tolist() == [1.0, 1.0]


def test_the_average_can_be_donated_beside_the_parameters():
    params = jnp.ones(2)
    tx = ema(0.5)
    step = jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=(0, 1))
    step(params, tx.init(params))


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_decay_is_a_share(decay):
    with pytest.raises(OptimizerOptionError, match=f"decay={decay}.*below 1"):
        ema(decay)


@pytest.mark.parametrize("count", [0, 2])
def test_one_average_is_needed(count):
    tx = optax.chain(optax.sgd(0.1), *[ema(0.9)] * count)
    with pytest.raises(MissingState, match=f"There are {count} averages"):
        get_ema(tx.init(jnp.ones(2)), jnp.ones(2))


def test_clipping_inside_sees_true_gradients():
    params = jnp.zeros(2)
    tx = jaxmp.loss_scaling(
        master_weights(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))),
        "mixed_float16",
    )
    state = tx.init(params)
    loss_fn = lambda w: jnp.sum(w * jnp.asarray([3.0, 4.0]))  # noqa: E731
    _, grads = jaxmp.value_and_grad(loss_fn)(params, loss_scale=state)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates, [-0.6, -0.8], rtol=1e-6)
