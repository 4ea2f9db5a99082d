"""The ways to train one model in mixed precision: by hand, with jmp and with jaxmp.

Each takes a `Job` and a half dtype, and returns a training step and its first state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jmp
import optax
from flax.training.dynamic_scale import DynamicScale
from models import Job

import jaxmp


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


def by_hand(job: Job, dtype: Any) -> Training:
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
        return DynamicScale(scale=jnp.float32(2.0**16), fin_steps=jnp.int32(0))

    return Training(step, initializer(job, model, tx, scale))


def with_jmp(job: Job, dtype: Any) -> Training:
    """jmp's casts of parameters, inputs and outputs, and its loss scale for float16."""
    policy = jmp.Policy(jnp.float32, dtype, jnp.float32)
    model, tx = job.model(), job.optimizer

    def loss_fn(params, state, batch):
        inputs, labels = batch
        params, inputs = policy.cast_to_compute((params, inputs))
        outputs, variables = model.apply(
            {"params": params, **state.variables},
            *inputs,
            mutable=list(state.variables),
        )
        loss = job.loss(policy.cast_to_output(outputs), labels)
        return state.scale.scale(loss), (loss, dict(variables))

    def step(state, batch):
        grads, (loss, variables) = jax.grad(loss_fn, has_aux=True)(
            state.params, state, batch
        )
        grads = state.scale.unscale(policy.cast_to_param(grads))
        finite = jmp.all_finite(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(params, variables, opt_state, state.scale)
        if isinstance(state.scale, jmp.DynamicLossScale):
            new = jmp.select_tree(finite, new, state)
            new = new._replace(scale=state.scale.adjust(finite))
        return new, loss

    def scale():
        if dtype == jnp.bfloat16:
            return jmp.NoOpLossScale()
        return jmp.DynamicLossScale(jnp.float32(2.0**16))

    return Training(step, initializer(job, model, tx, scale))


def with_jaxmp(
    job: Job,
    dtype: Any,
    *,
    autocast: bool,
    optimizer: Callable[..., Any] = lambda inner: inner,
    param_dtype: Any = jnp.float32,
) -> Training:
    """jaxmp's `autocast` or `apply_policy`, and its loss scale.

    `optimizer` wraps the job's own, and `param_dtype` is what it stores parameters in.
    """
    policy = jaxmp.Policy(param_dtype, dtype, jnp.float32)
    tx = jaxmp.loss_scaling(optimizer(job.optimizer), policy)
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
