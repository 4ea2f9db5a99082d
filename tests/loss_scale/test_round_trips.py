"""The state survives whatever users send a pytree through."""

import copy
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp

PARAMS = {"b": jnp.ones(2), "w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}
MODES = ["mixed_float16", "mixed_bfloat16", 256.0]


def trained(mode):
    tx = jaxmp.loss_scaling(optax.inject_hyperparams(optax.adamw)(0.1), mode)
    state = tx.init(PARAMS)
    for grad in (1.0, jnp.nan, 0.5):
        grads = jax.tree.map(lambda p, g=grad: p * g, PARAMS)
        _, state = tx.update(grads, state, PARAMS, value=grad)
    return tx, state


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def through_msgpack(tx, state):
    fresh = tx.init(PARAMS)
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))


def through_state_dict(tx, state):
    saved = flax.serialization.to_state_dict(state)
    return flax.serialization.from_state_dict(tx.init(PARAMS), saved)


def through_numpy(tx, state):
    del tx
    return jax.tree.map(np.asarray, state)


def through_flatten(tx, state):
    del tx
    return jax.tree.unflatten(*reversed(jax.tree.flatten(state)))


ROUND_TRIPS = {
    "pickle": lambda tx, state: pickle.loads(pickle.dumps(state)),
    "deepcopy": lambda tx, state: copy.deepcopy(state),
    "flax msgpack": through_msgpack,
    "flax state dict": through_state_dict,
    "numpy": through_numpy,
    "flatten": through_flatten,
    "jit": lambda tx, state: jax.jit(lambda s: s)(state),
    "device_put": lambda tx, state: jax.device_put(state, jax.devices()[-1]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_round_trip_keeps_every_bit_and_training_goes_on(trip, mode):
    tx, state = trained(mode)
    restored = ROUND_TRIPS[trip](tx, state)
    assert_same(restored, state)
    restored = jax.device_put(restored, jax.devices()[0])
    assert_same(tx.update(PARAMS, restored, PARAMS), tx.update(PARAMS, state, PARAMS))


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_one_mode_has_the_structure_of_another(mode):
    _, state = trained(mode)
    other, _ = trained("float32")
    assert_same(through_msgpack(other, state), state)


def test_tree_get_and_tree_set():
    tx, state = trained("mixed_float16")
    assert optax.tree_utils.tree_get(state, "loss_scale") == 2.0**15
    assert optax.tree_utils.tree_get(state, "skipped_steps") == 1
    assert optax.tree_utils.tree_get(state, "learning_rate") == jnp.float32(0.1)
    changed = optax.tree_utils.tree_set(state, loss_scale=jnp.float32(8.0))
    changed = optax.tree_utils.tree_set(changed, learning_rate=jnp.float32(0.5))
    assert float(jaxmp.get_loss_scale(changed)) == 8.0
    assert type(changed) is type(state)
    updates, _ = tx.update(PARAMS, changed, PARAMS)
    before, _ = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_allclose(updates["w"], 5 * before["w"], rtol=1e-6)


def test_tree_map_params_reaches_moments_and_leaves_the_scale_alone():
    tx, state = trained("mixed_float16")
    zeroed = optax.tree_utils.tree_map_params(tx, jnp.zeros_like, state)
    adam = optax.tree_utils.tree_get(zeroed, "mu")
    assert all(not x.any() for x in jax.tree.leaves(adam))
    assert float(zeroed.loss_scale) == 2.0**15
    assert int(zeroed.applied_steps) == 2


def test_jmp_scales_survive_too():
    for scale in (
        jaxmp.NoOpLossScale(),
        jaxmp.StaticLossScale(3.0),
        jaxmp.DynamicLossScale(2.0**5, period=7, factor=4, min_loss_scale=0.25),
    ):
        for trip in ("pickle", "deepcopy", "flatten", "jit"):
            restored = ROUND_TRIPS[trip](None, scale)
            assert type(restored) is type(scale)
            assert float(restored.loss_scale) == float(scale.loss_scale)
            for field in ("period", "factor", "min_loss_scale"):
                assert getattr(restored, field, None) == getattr(scale, field, None)
