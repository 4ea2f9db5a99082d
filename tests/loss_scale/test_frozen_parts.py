"""An overflow in what is never applied costs no step, and any other does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp

PARAMS = {"head": jnp.ones(3), "body": {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}}
LABELS = {"head": "train", "body": "frozen"}
HEAD = {"head": True, "body": {"w": False, "b": False}}
BODY = jax.tree.map(lambda x: not x, HEAD)
ADAM = optax.adam(0.1)


def partitioned(train):
    return optax.partition({"train": train, "frozen": optax.set_to_zero()}, LABELS)


FREEZING = {
    "partition": partitioned(ADAM),
    "partition in a chain": optax.chain(optax.clip(1.0), partitioned(ADAM)),
    "freeze first": optax.chain(optax.transforms.freeze(BODY), ADAM),
    "masked twice": optax.chain(
        optax.masked(ADAM, HEAD), optax.masked(optax.set_to_zero(), BODY)
    ),
    "trainable": jaxmp.master_weights(ADAM, trainable=HEAD),
    "clip of the trained part": partitioned(
        optax.chain(optax.clip_by_global_norm(1.0), ADAM)
    ),
    "accumulate inside": jaxmp.master_weights(
        jaxmp.accumulate(ADAM, 1), trainable=HEAD
    ),
    "masters inside": optax.chain(partitioned(jaxmp.cast_state(ADAM, "bfloat16"))),
}
USING = {
    "clip before the mask": optax.chain(
        optax.clip_by_global_norm(1.0), partitioned(ADAM)
    ),
    "moments before the mask": optax.chain(ADAM, optax.transforms.freeze(BODY)),
    "a mask that passes gradients on": optax.masked(ADAM, HEAD),
    "frozen by a factor": optax.partition(
        {"train": ADAM, "frozen": optax.scale(0.0)}, LABELS
    ),
    "no mask": ADAM,
}


def grads_with(part, x):
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    bad = jax.tree.map(lambda g: g.at[0].set(x), grads[part])
    return {**grads, part: bad}


@functools.cache
def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


@pytest.mark.parametrize("name", FREEZING)
@pytest.mark.parametrize("x", [jnp.inf, jnp.nan])
def test_an_overflow_in_a_frozen_part_costs_no_step(name, x):
    tx = jaxmp.loss_scaling(FREEZING[name], "mixed_float16")
    step = step_of(tx)
    params, state = step(PARAMS, tx.init(PARAMS), grads_with("body", x))
    assert (params["head"] != PARAMS["head"]).all()
    jax.tree.map(np.testing.assert_array_equal, params["body"], PARAMS["body"])
    assert bool(jaxmp.all_finite(state))
    assert int(state.applied_steps) == 1
    assert float(state.loss_scale) == 2.0**16
    again, state = step(params, state, grads_with("head", x))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (int(state.applied_steps), int(state.skipped_steps)) == (1, 1)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", USING)
def test_an_overflow_that_anything_is_computed_from_costs_the_step(name):
    tx = jaxmp.loss_scaling(USING[name], "mixed_float16")
    params, state = step_of(tx)(PARAMS, tx.init(PARAMS), grads_with("body", jnp.inf))
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert bool(jaxmp.all_finite(state))
    assert int(state.skipped_steps) == 1


def test_without_jit_the_update_is_looked_through_once():
    traces = []

    def update(updates, state, params=None):
        traces.append(isinstance(updates["head"], jax.core.Tracer))
        return updates, state

    counting = optax.stateless(lambda updates, _: update(updates, ())[0])
    tx = jaxmp.loss_scaling(partitioned(counting), "mixed_float16")
    state = tx.init(PARAMS)
    for x in (jnp.inf, 1.0, jnp.inf):
        _, state = tx.update(grads_with("body", x), state, PARAMS)
    assert int(state.applied_steps) == 3
    assert traces == [True, False, False, False]
