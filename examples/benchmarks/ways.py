"""The ways to train one model in mixed precision: by hand, with a peer, with jaxmp.

Each takes a `Job` and a half dtype, and returns a training step and its first state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jmp
import mpx
import optax
from flax.training.dynamic_scale import DynamicScale
from models import Job

import jaxmp

INIT_SCALE = 2.0**16


class Training(NamedTuple):
    """A step, and what it starts from."""

    step: Callable[[Any, Any], tuple[Any, jax.Array]]
    """`(state, batch)` to the next state and the loss."""
    init: Callable[[jax.Array], Any]
    """Takes a key; returns the first state."""


class State(NamedTuple):
    """What training changes."""

    params: Any
    variables: Any
    """Statistics or memory, that is, all variables which are not trained."""
    opt_state: Any
    scale: Any = None
    """Of those whose loss scale is not in the optimizer's state."""


def initializer(job, model, tx, scale=lambda: None):
    """Returns a function of a key that makes the first state."""

    def init(key):
        inputs, _ = job.batch(key)
        variables = dict(model.init(key, *inputs))
        params = variables.pop("params")
        return State(params, variables, tx.init(params), scale())

    return init


def loss_function(job, model):
    """Returns the plain loss of a model, with its new variables."""

    def loss_fn(params, variables, batch):
        inputs, labels = batch
        outputs, variables = model.apply(
            {"params": params, **variables}, *inputs, mutable=list(variables)
        )
        return job.loss(outputs, labels), dict(variables)

    return loss_fn


def plain(job: Job, dtype: Any = None) -> Training:
    """The model with `dtype=` by hand and nothing else; float32 without one."""
    model, tx = job.model(dtype=dtype), job.optimizer
    differentiated = jax.value_and_grad(loss_function(job, model), has_aux=True)

    def step(state, batch):
        (loss, variables), grads = differentiated(state.params, state.variables, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, variables, opt_state), loss

    return Training(step, initializer(job, model, tx))


def by_hand(job: Job, dtype: Any, *, init_scale: float = INIT_SCALE) -> Training:
    """`dtype=` by hand, and for float16 Flax's `DynamicScale`."""
    if dtype == jnp.bfloat16:
        return plain(job, dtype)
    model, tx = job.model(dtype=dtype), job.optimizer
    loss_fn = loss_function(job, model)

    def step(state, batch):
        differentiated = state.scale.value_and_grad(loss_fn, has_aux=True)
        scale, finite, (loss, variables), grads = differentiated(
            state.params, state.variables, batch
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(params, variables, opt_state), state._replace(scale=None)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), *new)
        return state._replace(scale=scale), loss

    def scale():
        # As arrays: with its own Python numbers it compiles twice.
        return DynamicScale(scale=jnp.float32(init_scale), fin_steps=jnp.int32(0))

    return Training(step, initializer(job, model, tx, scale))


def with_apply_if_finite(job: Job, dtype: Any) -> Training:
    """`dtype=` by hand, no loss scale, and Optax's `apply_if_finite`."""
    optimizer = optax.apply_if_finite(job.optimizer, max_consecutive_errors=1000)
    return plain(job._replace(optimizer=optimizer), dtype)


def with_mpx(job: Job, *, init_scale: float = INIT_SCALE) -> Training:
    """mpx's casts, loss scale and update, which are in float16."""
    model, tx = job.model(), job.optimizer
    loss_fn = loss_function(job, model)

    def step(state, batch):
        differentiated = mpx.filter_value_and_grad(loss_fn, state.scale, has_aux=True)
        (loss, variables), scale, finite, grads = differentiated(
            state.params, state.variables, batch
        )
        params, opt_state = mpx.optimizer_update(
            state.params, tx, state.opt_state, grads, finite
        )
        variables = mpx.select_tree(finite, variables, state.variables)
        return State(params, variables, opt_state, scale), loss

    def scale():
        return mpx.DynamicLossScaling(jnp.float32(init_scale), jnp.float32(1))

    return Training(step, initializer(job, model, tx, scale))


def with_jmp(job: Job, dtype: Any, *, init_scale: float = INIT_SCALE) -> Training:
    """jmp's casts of parameters, inputs and outputs, and its loss scale for float16."""
    policy = jmp.Policy(jnp.float32, dtype, jnp.float32)
    model, tx = job.model(), job.optimizer

    def loss_scale(state):
        # Of arrays, as `jit(...).lower` takes no state that holds a DynamicLossScale.
        if state.scale is None:
            return jmp.NoOpLossScale()
        return jmp.DynamicLossScale(*state.scale)

    def loss_fn(params, state, batch):
        inputs, labels = batch
        params, inputs = policy.cast_to_compute((params, inputs))
        outputs, variables = model.apply(
            {"params": params, **state.variables},
            *inputs,
            mutable=list(state.variables),
        )
        loss = job.loss(policy.cast_to_output(outputs), labels)
        return loss_scale(state).scale(loss), (loss, dict(variables))

    def step(state, batch):
        grads, (loss, variables) = jax.grad(loss_fn, has_aux=True)(
            state.params, state, batch
        )
        scale = loss_scale(state)
        grads = scale.unscale(policy.cast_to_param(grads))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(params, variables, opt_state, state.scale)
        if state.scale is not None:
            finite = jmp.all_finite(grads)
            scale = scale.adjust(finite)
            new = jmp.select_tree(finite, new, state)
            new = new._replace(scale=(scale.loss_scale, scale.counter))
        return new, loss

    def scale():
        if dtype == jnp.bfloat16:
            return None
        return jnp.float32(init_scale), jnp.int32(0)

    return Training(step, initializer(job, model, tx, scale))


def with_jaxmp(
    job: Job,
    dtype: Any,
    *,
    autocast: bool,
    optimizer: Callable[..., Any] = lambda inner: inner,
    param_dtype: Any = jnp.float32,
    init_scale: float = INIT_SCALE,
) -> Training:
    """jaxmp's `autocast` or `apply_policy`, and its loss scale.

    `optimizer` wraps the job's own, and `param_dtype` is what it stores parameters in.
    """
    policy = jaxmp.Policy(param_dtype, dtype, jnp.float32)
    tx = jaxmp.loss_scaling(optimizer(job.optimizer), policy, init_scale=init_scale)
    model = job.model() if autocast else jaxmp.apply_policy(job.model(), policy)
    loss_fn = loss_function(job, model)
    if autocast:
        loss_fn = jaxmp.autocast(loss_fn, policy)
    differentiated = jaxmp.value_and_grad(loss_fn, has_aux=True)

    def step(state, batch):
        (loss, variables), grads = differentiated(
            state.params, state.variables, batch, loss_scale=state.opt_state
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        variables = jaxmp.select_applied(opt_state, variables, state.variables)
        return State(params, variables, opt_state), loss

    init = initializer(job, model, optax.identity())

    def init_in_param_dtype(key):
        state = init(key)
        params = policy.cast_to_param(state.params)
        return state._replace(params=params, opt_state=tx.init(params))

    return Training(step, init_in_param_dtype)
