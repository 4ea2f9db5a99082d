"""`inner_state`: Optax functions that take a state work under every wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import jaxmp
from jaxmp.errors import MissingState
from jaxmp.loss_scale import inner_state

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 4)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)

WRAPPERS = {
    "loss_scaling": lambda tx: jaxmp.loss_scaling(tx, "mixed_float16"),
    "all": lambda tx: jaxmp.loss_scaling(
        jaxmp.master_weights(jaxmp.accumulate(tx, 1)), "mixed_float16"
    ),
    "accumulate alone": lambda tx: jaxmp.accumulate(tx, 1),
}


def trained(tx, params=PARAMS, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("chained", [False, True])
def test_schedule_free(wrapper, chained):
    tx = contrib.schedule_free_sgd(0.1)
    plain_params, plain = trained(tx)
    expected = contrib.schedule_free_eval_params(plain, plain_params)
    inside = optax.chain(optax.clip(10.0), tx) if chained else tx
    params, state = trained(WRAPPERS[wrapper](inside))
    found = inner_state(state, contrib.ScheduleFreeState if chained else None)
    actual = contrib.schedule_free_eval_params(found, params)
    np.testing.assert_allclose(actual["w"], expected["w"], rtol=1e-6)


def test_lookahead():
    tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = jaxmp.loss_scaling(tx, "mixed_float16").init(params)
    assert isinstance(inner_state(state), type(tx.init(params)))


def test_multi_steps():
    tx = optax.MultiSteps(optax.adam(0.1), 2)
    _, state = trained(jaxmp.loss_scaling(tx, "mixed_float16"), steps=2)
    assert bool(tx.has_updated(inner_state(state)))
    _, state = trained(jaxmp.loss_scaling(tx, "mixed_float16"), steps=3)
    assert not bool(tx.has_updated(inner_state(state)))


def test_injected_hyperparameters_and_trees():
    tx = jaxmp.loss_scaling(optax.inject_hyperparams(optax.adam)(0.1), "mixed_float16")
    _, state = trained(tx)
    assert float(inner_state(state).hyperparams["learning_rate"]) == np.float32(0.1)
    slower = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(0.01))
    assert float(inner_state(slower).hyperparams["learning_rate"]) == np.float32(0.01)
    moments = optax.tree_utils.tree_get(inner_state(state), "mu")
    assert (moments["w"] > 0).all()


def test_train_states_and_nnx_optimizers_hold_one_too():
    state = jaxmp.TrainState.create(
        apply_fn=None,
        params=PARAMS,
        tx=contrib.schedule_free_sgd(0.1),
        policy="mixed_float16",
    )
    assert isinstance(inner_state(state), contrib.ScheduleFreeState)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = jaxmp.loss_scaling(contrib.schedule_free_sgd(0.1), "mixed_float16")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert isinstance(inner_state(optimizer), contrib.ScheduleFreeState)


def test_what_is_not_there_is_named():
    adam = optax.adam(0.1).init(PARAMS)
    with pytest.raises(MissingState, match=r"no state of jaxmp in this tuple"):
        inner_state(adam)
    with pytest.raises(MissingState, match=r"There are 0 .*ScheduleFreeState"):
        inner_state(adam, contrib.ScheduleFreeState)
    with pytest.raises(MissingState, match=r"There are 2 .*ScaleByAdamState"):
        inner_state((adam, adam), optax.ScaleByAdamState)
