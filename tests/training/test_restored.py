"""States from elsewhere: what cannot be of this optimizer, and runs that go on."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import jaxmp
from jaxmp.errors import (
    CheckpointPolicyMismatch,
    DtypeMismatch,
    MasterWeightsMismatch,
    MissingLossScale,
    TrainStateOptionError,
)
from jaxmp.training import adopt, check_restored

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 4)}
GOOD = {"w": jnp.ones(4)}
BAD = {"w": jnp.full(4, jnp.inf)}
apply = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))


@functools.cache
def make(policy, **kwargs):
    return jaxmp.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.adam(0.1), policy=policy, **kwargs
    )


def after(policy, steps, **kwargs):
    state = make(policy, **kwargs)
    for good in steps:
        state = apply(state, GOOD if good else BAD)
    return state


HISTORIES = [
    steps for n in range(4) for steps in itertools.product([True, False], repeat=n)
]
OTHERS = [("mixed_float16", "mixed_bfloat16"), ("float32", "mixed_float16")]


@pytest.mark.parametrize(("written", "read"), OTHERS)
def test_every_short_history_of_another_policy_is_noticed(written, read):
    for steps in HISTORIES:
        state = make(read).replace(opt_state=after(written, steps).opt_state)
        with pytest.raises(CheckpointPolicyMismatch) as error:
            check_restored(state)
        assert repr(str(jaxmp.get_policy(read))) in str(error.value)
        assert "convert_like" in str(error.value)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_no_history_of_its_own_policy_is(policy):
    options = {"growth_interval": 2, "hysteresis": 2, "min_scale": 2.0**14}
    for kwargs in ({}, options):
        for steps in (*HISTORIES, [False] * 20, [False] * 20 + [True]):
            state = after(policy, steps, **kwargs)
            check_restored(state)
            check_restored(state.opt_state, tx=state.tx)


def test_a_scale_of_the_users_own_choice_is_what_the_optimizer_says():
    tx = jaxmp.static_loss_scaling(optax.adam(0.1), 1024)
    state = jaxmp.TrainState.create(
        apply_fn=None, params=PARAMS, tx=tx, policy="mixed_bfloat16"
    )
    check_restored(state)
    with pytest.raises(CheckpointPolicyMismatch, match="the constant 1024"):
        check_restored(state.replace(opt_state=make("float32").opt_state))


def test_dtypes_and_masters_are_compared_too():
    half = {"w": PARAMS["w"].astype(jnp.bfloat16)}
    state = jaxmp.TrainState.create(
        apply_fn=None,
        params=half,
        tx=jaxmp.master_weights(optax.adam(0.1)),
        policy="bfloat16",
    )
    check_restored(state)
    with pytest.raises(MasterWeightsMismatch):
        check_restored(state.replace(params={"w": half["w"] * 2}))
    wrong = jax.tree.map(
        lambda x: x.astype(jnp.float16) if x.ndim else x, make("float32").opt_state
    )
    with pytest.raises(DtypeMismatch, match="float16, should be float32"):
        check_restored(make("float32").replace(opt_state=wrong))


def test_an_optimizer_state_alone_asks_for_the_optimizer():
    with pytest.raises(MissingLossScale, match="tx=tx"):
        check_restored(make("float32").opt_state)
    with pytest.raises(MissingLossScale):
        check_restored(optax.adam(0.1).init(PARAMS), tx=optax.adam(0.1))


# Adopting a float32 run


class WithStats(jaxmp.TrainState):
    batch_stats: Any = None


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_adopted_run_goes_on_as_it_would_have(policy, steps):
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    old = train_state.TrainState.create(
        apply_fn=max, params=PARAMS, tx=optax.adamw(schedule)
    )
    for _ in range(steps):
        old = old.apply_gradients(grads=GOOD)
    new = adopt(old, policy, cls=WithStats, batch_stats={"mean": 1}, init_scale=8.0)
    assert (new.apply_fn, new.batch_stats) == (max, {"mean": 1})
    assert float(jaxmp.get_loss_scale(new)) == (
        8.0 if policy == "mixed_float16" else 1.0
    )
    check_restored(new)
    types = jax.tree.map(jax.typeof, new)
    for _ in range(2):
        old, new = old.apply_gradients(grads=GOOD), apply(new, GOOD)
    np.testing.assert_allclose(new.params["w"], old.params["w"], rtol=1e-6)
    assert int(new.step) == int(new.opt_state.applied_steps) == old.step == steps + 2
    assert jax.tree.map(jax.typeof, new) == types


def test_what_cannot_be_adopted_is_named():
    with pytest.raises(TrainStateOptionError, match="already has a loss scale"):
        adopt(make("float32"), "mixed_float16")
    old = train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.adam(0.1)
    )
    with pytest.raises(TrainStateOptionError, match="'batch_stats'"):
        adopt(old, "float32", batch_stats={})


def test_float32_masters_take_an_old_run_into_half_precision():
    inner = optax.adam(0.1)
    params, state = PARAMS, inner.init(PARAMS)
    for _ in range(2):
        updates, state = inner.update(GOOD, state, params)
        params = optax.apply_updates(params, updates)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = jaxmp.master_weights(inner)
    adopted = tx.init(half)._replace(inner_state=state)
    half, adopted = jaxmp.optimizers.load_master_weights(adopted, half, params)
    updates, _ = inner.update(GOOD, state, params)
    _, adopted = tx.update(GOOD, adopted, half)
    np.testing.assert_array_equal(
        adopted.master["w"], optax.apply_updates(params, updates)["w"]
    )


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_an_adopted_optimizer_state_goes_on_as_it_would_have(policy):
    optimizer = optax.adamw(optax.linear_schedule(0.1, 0.0, 5))
    params, old = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        updates, old = optimizer.update(GOOD, old, params)
        params = optax.apply_updates(params, updates)
    tx = jaxmp.loss_scaling(optimizer, policy)
    new = adopt(old, tx)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, tx.init(params))
    check_restored(new, tx=tx, params=params)
    ours, _ = tx.update(GOOD, new, params)
    theirs, _ = optimizer.update(GOOD, old, params)
    np.testing.assert_array_equal(ours["w"], theirs["w"])


def test_an_optimizer_state_is_adopted_by_its_optimizer_alone():
    old = optax.adam(0.1).init(PARAMS)
    behind = optax.chain(optax.clip(1.0), jaxmp.loss_scaling(optax.sgd(1), "float32"))
    for wrong in ("mixed_float16", optax.adam(0.1), behind):
        with pytest.raises(MissingLossScale, match="adopt\\(opt_state, loss_scaling"):
            adopt(old, wrong)
    tx = jaxmp.loss_scaling(optax.adam(0.1), "float32")
    with pytest.raises(TrainStateOptionError, match="already has a loss scale"):
        adopt(tx.init(PARAMS), tx)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_what_was_adopted_goes_back_bit_for_bit(policy):
    old = train_state.TrainState.create(
        apply_fn=max, params=PARAMS, tx=optax.adam(0.1)
    ).apply_gradients(grads=GOOD)
    new = adopt(old, policy)
    back = old.replace(
        step=new.step,
        params=new.params,
        opt_state=jaxmp.loss_scale.inner_state(new),
    )
    assert jax.tree.structure(back) == jax.tree.structure(old)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(ours, theirs)
