"""Warnings name the user's line, and come where they should and nowhere else."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxmp
from jaxmp.errors import (
    Fp8MetadataWarning,
    HalfParamsWarning,
    UnscaledGradientsWarning,
)

PARAMS = {"w": jnp.ones((4, 2))}
X = jnp.ones((8, 4))
HALF = {"w": jnp.ones((4, 2), jnp.bfloat16)}


def loss_fn(params, x):
    half = x.astype(jnp.float16) @ params["w"].astype(jnp.float16)
    return jnp.mean(half.astype(jnp.float32) ** 2)


def caught(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return found


def assert_points_here(found, category, function):
    assert [warning.category for warning in found] == [category]
    assert found[0].filename == __file__
    lines, start = inspect.getsourcelines(function)
    assert found[0].lineno in range(start, start + len(lines))


def scaled(tx=None, **kwargs):
    return jaxmp.loss_scaling(tx or optax.adam(0.1), "mixed_float16", **kwargs)


class Half(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(2, jnp.bfloat16))


INITS = {
    "directly": lambda: scaled().init(HALF),
    "in a chain": lambda: optax.chain(scaled(), optax.clip(1.0)).init(HALF),
    "in a jit": lambda: jax.jit(scaled().init)(HALF),
    "nnx.Optimizer": lambda: nnx.Optimizer(Half(), scaled(), wrt=nnx.Param),
    "TrainState": lambda: jaxmp.TrainState.create(
        apply_fn=None, params=HALF, tx=optax.adam(0.1), policy="bf16-true"
    ),
}


@pytest.mark.parametrize("name", INITS)
def test_half_parameters_are_named_at_the_users_line(name):
    assert_points_here(caught(INITS[name]), HalfParamsWarning, INITS[name])


def test_so_is_a_scale_that_is_no_floating_number():
    make = lambda: jaxmp.DynamicLossScale(jnp.int32(8))  # noqa: E731
    assert_points_here(caught(make), UserWarning, make)


# Scales of float8 layers

FP8 = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(1)}}


def updated(inner, params=FP8, run=lambda f: f, scale="mixed_bfloat16"):
    tx = jaxmp.loss_scaling(inner, scale)
    return run(tx.update)(params, tx.init(params), params)


class Fp8(nnx.Module):
    def __init__(self):
        metadata = nnx.variable_type_from_name(
            "_overwrite_with_gradient", allow_register=True
        )
        self.scale = metadata(jnp.ones(1))


def update_nnx():
    model, tx = Fp8(), scaled()
    state = nnx.state(model)
    tx.update(state, tx.init(state), state)


TRAINED_SCALES = {
    "directly": lambda: updated(optax.adam(0.1)),
    "in a jit": lambda: updated(optax.adam(0.1), run=jax.jit),
    "master_weights": lambda: updated(jaxmp.master_weights(optax.adam(0.1))),
    "masked": lambda: updated(
        optax.masked(
            optax.adam(0.1), {"params": True, "_overwrite_with_gradient": False}
        )
    ),
    "static": lambda: updated(optax.sgd(0.1), scale=1024),
    "TrainState": lambda: jaxmp.TrainState.create(
        apply_fn=None, params={"a": FP8}, tx=optax.sgd(0.1), policy="float32"
    ).apply_gradients(grads={"a": FP8}),
    "nnx": update_nnx,
}


@pytest.mark.parametrize("name", TRAINED_SCALES)
def test_scales_that_are_trained_are_named_at_the_users_line(name):
    function = update_nnx if name == "nnx" else TRAINED_SCALES[name]
    found = caught(function)
    assert [warning.category for warning in found] == [Fp8MetadataWarning]
    assert found[0].filename == __file__
    assert "is the first" in str(found[0].message)
    assert "overwrite_with_gradient(optimizer)" in str(found[0].message)


def test_the_line_is_that_of_the_update():
    tx = scaled()
    state = tx.init(FP8)
    update = lambda: tx.update(FP8, state, FP8)  # noqa: E731
    assert_points_here(caught(update), Fp8MetadataWarning, update)


OVERWRITTEN_SCALES = {
    "inside": lambda: updated(jaxmp.overwrite_with_gradient(optax.adam(0.1))),
    "deep inside": lambda: updated(
        optax.chain(
            optax.identity(),
            jaxmp.master_weights(
                jaxmp.accumulate(jaxmp.overwrite_with_gradient(optax.sgd(0.1)), 2)
            ),
        )
    ),
    "TrainState": lambda: jaxmp.TrainState.create(
        apply_fn=None, params=FP8, tx=optax.sgd(0.1), policy="float32"
    ).apply_gradients(grads=FP8),
    "no scales": lambda: updated(optax.adam(0.1), FP8["params"]),
}


@pytest.mark.parametrize("name", OVERWRITTEN_SCALES)
def test_nothing_is_said_where_scales_are_overwritten(name):
    assert caught(OVERWRITTEN_SCALES[name]) == []


# Gradients without a scale


def step_of(tx, gradients):
    def step(params, state, x):
        grads = gradients(params, state, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def plain(params, state, x):
    return jax.grad(loss_fn)(params, x)


def under_the_scale(params, state, x):
    return jaxmp.grad(loss_fn)(params, x, loss_scale=state)


def per_example(params, state, x):
    grads = jax.vmap(lambda row: jax.grad(loss_fn)(params, row[None]))(x)
    return jax.tree.map(lambda g: g.mean(0), grads)


def clipped_and_summed(params, state, x):
    def add(total, row):
        grads = jax.grad(loss_fn)(params, row[None])
        return jax.tree.map(jnp.add, total, grads), None

    return jax.lax.scan(add, params, x)[0]


UNSCALED = {
    "jax.grad": plain,
    "in a jit": lambda params, state, x: jax.jit(jax.grad(loss_fn))(params, x),
    "per example": per_example,
    "in a scan": clipped_and_summed,
    "value_and_grad": lambda p, s, x: jax.value_and_grad(loss_fn)(p, x)[1],
    "clipped": lambda p, s, x: jax.tree.map(jnp.tanh, plain(p, s, x)),
}


def retried(params, state, x):
    grads = jaxmp.retry(jaxmp.value_and_grad(loss_fn))
    return grads(params, x, loss_scale=state)[0][1]


SCALED = {
    "jaxmp.grad": under_the_scale,
    "in a jit": lambda p, s, x: jax.jit(under_the_scale)(p, s, x),
    "per example": lambda p, s, x: jax.tree.map(
        lambda g: g.mean(0),
        jax.vmap(lambda row: under_the_scale(p, s, row[None]))(x),
    ),
    "in a scan": lambda p, s, x: jax.lax.scan(
        lambda total, row: (
            jax.tree.map(jnp.add, total, under_the_scale(p, s, row[None])),
            None,
        ),
        p,
        x,
    )[0],
    "micro-batches": lambda p, s, x: jaxmp.grad(loss_fn, micro_batches=2)(
        p, x, loss_scale=s
    ),
    "with a penalty": lambda p, s, x: jax.tree.map(
        jnp.add, under_the_scale(p, s, x), jax.grad(lambda p: jnp.sum(p["w"] ** 2))(p)
    ),
    "retried": retried,
    "by hand": lambda p, s, x: {"w": p["w"] * x.mean()},
    "ones": lambda p, s, x: jax.tree.map(jnp.ones_like, p),
}


@pytest.mark.parametrize("name", UNSCALED)
def test_gradients_without_the_scale_are_noticed_in_a_compiled_step(name):
    tx = scaled()
    step = step_of(tx, UNSCALED[name])
    state = tx.init(PARAMS)
    found = caught(lambda: jax.jit(step)(PARAMS, state, X))
    assert_points_here(found, UnscaledGradientsWarning, step)
    for word in ("jaxmp.value_and_grad", "state.value_and_grad", "NoOpLossScale"):
        assert word in str(found[0].message)


@pytest.mark.parametrize("name", SCALED)
def test_gradients_under_the_scale_or_by_hand_raise_no_alarm(name):
    tx = scaled()
    jax.jit(step_of(tx, SCALED[name]))(PARAMS, tx.init(PARAMS), X)


@pytest.mark.parametrize(
    "tx",
    [
        jaxmp.loss_scaling(optax.adam(0.1), "mixed_bfloat16"),
        jaxmp.loss_scaling(optax.adam(0.1), jaxmp.NoOpLossScale()),
        jaxmp.static_loss_scaling(optax.adam(0.1), 8),
    ],
)
def test_scales_that_do_not_move_raise_no_alarm(tx):
    jax.jit(step_of(tx, plain))(PARAMS, tx.init(PARAMS), X)


def test_gradients_from_another_compiled_function_raise_no_alarm():
    tx = scaled()
    grads = jax.jit(plain)(PARAMS, None, X)
    jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)


def test_scaling_by_hand_is_noticed_if_it_is_forgotten():
    tx = scaled(grads_are_scaled=True)
    state = tx.init(PARAMS)

    def by_hand(params, state, x):
        return jax.grad(lambda p: jaxmp.scale_loss(loss_fn(p, x), state))(params)

    jax.jit(step_of(tx, by_hand))(PARAMS, state, X)
    found = caught(lambda: jax.jit(step_of(tx, plain))(PARAMS, state, X))
    assert "jaxmp.scale_loss(loss, opt_state)" in str(found[0].message)


def test_train_states_and_nnx_optimizers_are_looked_at_too():
    state = jaxmp.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.adam(0.1), policy="mixed_float16"
    )

    @functools.partial(jax.jit, static_argnums=1)
    def step(state, differentiate):
        loss_of = differentiate(state)(loss_fn)
        loss, grads = loss_of(state.params, X)
        return state.apply_gradients(grads=grads, value=loss)

    step(state, lambda state: state.value_and_grad)
    found = caught(lambda: step(state, lambda _: jax.value_and_grad))
    assert_points_here(found, UnscaledGradientsWarning, step)

    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, scaled(), wrt=nnx.Param)

    @nnx.jit
    def nnx_step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
        optimizer.update(model, grads)

    found = caught(lambda: nnx_step(model, optimizer))
    assert [warning.category for warning in found] == [UnscaledGradientsWarning]
