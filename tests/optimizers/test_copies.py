"""`load_master_weights` reaches the first weights that an optimizer keeps a copy of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxmp
from jaxmp.optimizers import ema, get_ema, get_master_weights, load_master_weights

WEIGHTS = {
    "w": jax.random.normal(jax.random.key(0), (6, 4)),
    "zero": jnp.zeros(4),
    "one": jnp.ones(4),
}
X = jax.random.normal(jax.random.key(1), (16, 6))

OPTIMIZERS = {
    "dog": contrib.dog(0.1),
    "dowg": contrib.dowg(0.1),
    "prodigy": contrib.prodigy(0.1),
    "mechanize": contrib.mechanize(optax.sgd(0.1)),
    "dadapt_adamw": contrib.dadapt_adamw(0.1),
    "cocob": contrib.cocob(),
    "schedule_free": contrib.schedule_free_sgd(0.1),
    "momo": contrib.momo(0.1),
    "adam": optax.adam(0.1),
    "ema": optax.chain(optax.adam(0.1), ema(0.9)),
    "masked": optax.masked(
        contrib.prodigy(0.1), {"w": True, "zero": False, "one": True}
    ),
    "accumulate": jaxmp.accumulate(contrib.dog(0.1), 1),
    "MultiSteps": optax.MultiSteps(contrib.cocob(), 2),
}


def loss_fn(params):
    return jnp.mean((jnp.tanh(X @ params["w"] * params["one"][None]) - 1) ** 2)


def halves(weights=WEIGHTS, dtype=jnp.bfloat16):
    return jax.tree.map(lambda x: x.astype(dtype), weights)


def trained(tx, params, state, read):
    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(read(state, params))
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    return read(state, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loaded_weights_train_as_float32_ones(name):
    inner = OPTIMIZERS[name]
    if name == "MultiSteps":
        inner = inner.gradient_transformation()
    inner = optax.with_extra_args_support(inner)
    expected = trained(inner, WEIGHTS, inner.init(WEIGHTS), lambda _, params: params)
    tx = jaxmp.master_weights(inner)
    params = halves()
    params, state = load_master_weights(tx.init(params), params, WEIGHTS)
    actual = trained(tx, params, state, get_master_weights)
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)  # XLA's order of a sum of squares


@pytest.mark.parametrize("kwargs", [{"split": True}, {"trainable": {"w": True}}])
def test_so_do_split_masters_and_a_part_of_the_weights(kwargs):
    weights = {"w": WEIGHTS["w"]}
    tx = jaxmp.loss_scaling(jaxmp.master_weights(contrib.cocob(), **kwargs), "bfloat16")
    params = halves(weights)
    _, state = jax.jit(load_master_weights)(tx.init(params), params, weights)
    first = optax.tree_utils.tree_get(state, "init_particles")
    np.testing.assert_array_equal(first["w"], weights["w"])


def test_what_stands_beside_the_masters_gets_the_rounded_weights():
    tx = optax.chain(jaxmp.master_weights(optax.adam(0.1)), ema(0.9))
    params = jax.tree.map(jnp.zeros_like, halves()) | {"w": halves()["w"] * 2}
    params, state = load_master_weights(tx.init(params), params, WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, get_ema(state, params), halves())
    assert get_ema(state, WEIGHTS)["w"].dtype == jnp.float32
    np.testing.assert_array_equal(state[0].master["w"], WEIGHTS["w"])


def test_moments_and_moved_copies_are_left_alone():
    """A moment of zero beside a bias of zero is not a copy of it."""
    tx = jaxmp.master_weights(optax.chain(optax.adam(0.1), ema(0.5)))
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.zeros(2, jnp.bfloat16)}
    new = {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 5.0)}
    first = tx.init(params)
    _, loaded = load_master_weights(first, params, new)
    adam = loaded.inner_state[0][0]
    assert not any(jnp.any(x) for x in jax.tree.leaves((adam.mu, adam.nu)))
    grads = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    updates, moved = tx.update(grads, first, params)
    params = optax.apply_updates(params, updates)
    _, loaded = load_master_weights(moved, params, new)
    jax.tree.map(np.testing.assert_array_equal, loaded.inner_state, moved.inner_state)
