"""A float32 run that is adopted, or given back, goes on as if nothing was."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training import train_state

import jaxmp
from jaxmp.errors import CheckpointPolicyMismatch
from jaxmp.loss_scale import inner_state
from jaxmp.training import adopt, check_restored

MODEL = nn.Sequential([nn.Dense(16), nn.gelu, nn.Dense(4)])
OPTIMIZER = optax.adamw(optax.linear_schedule(0.1, 0.0, 10))
X = jax.random.normal(jax.random.key(0), (8, 4))
Y = jax.random.normal(jax.random.key(1), (8, 4))
PARAMS = MODEL.init(jax.random.key(2), X)["params"]


def loss_fn(params):
    return jnp.mean((MODEL.apply({"params": params}, X) - Y) ** 2)


@jax.jit
def plain_step(state):
    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def scaled_step(state):
    loss_under_policy = jaxmp.autocast(loss_fn, state.policy)
    loss, grads = state.value_and_grad(loss_under_policy)(state.params)
    return state.apply_gradients(grads=grads, value=loss), loss


def run(step, state, steps=4):
    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    return state, losses


def new_plain():
    return train_state.TrainState.create(
        apply_fn=MODEL.apply, params=PARAMS, tx=OPTIMIZER
    )


@functools.cache  # not at import, where XLA's options are not yet those of the tests
def old():
    return run(plain_step, new_plain())[0]


@functools.cache
def uninterrupted():
    return run(plain_step, old())[1]


def assert_goes_on(losses):
    """The first loss is exact; two programs may round the updates behind it apart."""
    assert losses[0] == uninterrupted()[0]
    np.testing.assert_allclose(losses, uninterrupted(), rtol=1e-5)


def by_msgpack(state, like, folder):
    return serialization.from_bytes(like, serialization.to_bytes(state))


def by_orbax(state, like, folder):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        return manager.restore(1, args=ocp.args.StandardRestore(like))


@pytest.mark.parametrize("through", [by_msgpack, by_orbax])
def test_the_loss_goes_on_where_float32_stopped(through, tmp_path):
    restored = through(old(), new_plain(), tmp_path)
    state, losses = run(scaled_step, adopt(restored, "float32"))
    assert_goes_on(losses)
    assert int(state.step) == 8


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_first_half_loss_is_the_next_one_rounded(policy):
    _, losses = run(scaled_step, adopt(old(), policy))
    np.testing.assert_allclose(losses, uninterrupted(), rtol=2e-2)


def test_an_optimizer_state_goes_on_too():
    tx = jaxmp.loss_scaling(OPTIMIZER, "float32")

    @jax.jit
    def step(state):
        params, opt_state = state
        loss, grads = jaxmp.value_and_grad(loss_fn)(params, loss_scale=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return (optax.apply_updates(params, updates), opt_state), loss

    _, losses = run(step, (old().params, adopt(old().opt_state, tx)))
    assert_goes_on(losses)


def given_back(state):
    return new_plain().replace(
        step=state.step, params=state.params, opt_state=inner_state(state)
    )


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_run_that_is_given_back_at_once_is_the_old_one_bit_for_bit(policy):
    state = given_back(adopt(old(), policy))
    assert serialization.to_bytes(state) == serialization.to_bytes(old())
    assert run(plain_step, state)[1] == uninterrupted()


def test_a_run_that_is_given_back_goes_on_in_float32():
    state, _ = run(scaled_step, adopt(new_plain(), "float32"))
    plain, losses = run(plain_step, given_back(state))
    np.testing.assert_allclose(losses, uninterrupted(), rtol=1e-5)
    assert int(plain.step) == 8


def test_one_line_catches_a_checkpoint_of_the_other_half_precision(tmp_path):
    def make(policy):
        return jaxmp.TrainState.create(
            apply_fn=MODEL.apply, params=PARAMS, tx=OPTIMIZER, policy=policy
        )

    halves = ("mixed_float16", "mixed_bfloat16")
    for written in halves:
        state, _ = run(scaled_step, make(written))
        check_restored(by_orbax(state, make(written), tmp_path / written))
        (other,) = set(halves) - {written}
        restored = by_orbax(state, make(other), tmp_path / f"{written} as {other}")
        with pytest.raises(CheckpointPolicyMismatch, match="another policy"):
            check_restored(restored)


def test_an_nnx_run_moves_there_and_back():
    def step(optimizer, differentiate):
        @nnx.jit
        def train(network, optimizer):
            def loss_fn(network):
                return jnp.mean((network(X) - Y) ** 2)

            loss, grads = differentiate(loss_fn, network, optimizer)
            optimizer.update(network, grads)
            return loss

        return [float(train(network, optimizer)) for _ in range(3)]

    def plain(loss_fn, network, optimizer):
        return nnx.value_and_grad(loss_fn)(network)

    def scaled(loss_fn, network, optimizer):
        differentiate = jaxmp.value_and_grad(loss_fn, transform=nnx.value_and_grad)
        return differentiate(network, loss_scale=optimizer)

    def moved(tx, opt_state, step):
        new = nnx.Optimizer(network, tx, wrt=nnx.Param)
        wrapped = hasattr(new.opt_state, "inner_state")
        new.opt_state = (
            new.opt_state._replace(inner_state=opt_state) if wrapped else opt_state
        )
        new.step = step
        return new

    network = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, OPTIMIZER, wrt=nnx.Param)
    expected = [x for _ in range(3) for x in step(optimizer, plain)]

    network = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, OPTIMIZER, wrt=nnx.Param)
    losses = step(optimizer, plain)
    tx = jaxmp.loss_scaling(OPTIMIZER, "float32")
    new = moved(tx, optimizer.opt_state, optimizer.step)
    losses += step(new, scaled)
    back = moved(OPTIMIZER, inner_state(new), new.step)
    losses += step(back, plain)
    assert losses[:4] == expected[:4]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert int(back.step[...]) == 9
