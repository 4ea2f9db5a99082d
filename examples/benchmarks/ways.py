"""The ways to train one model in mixed precision: by hand, with a peer, with jaxmp.

Each takes a `Job`, most of them a half dtype, and returns a `Training`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jmp
import optax
from flax.training.dynamic_scale import DynamicScale
from models import Job

import jaxmp

INIT_SCALE = 2.0**16


class Training(NamedTuple):
    """A training step and its first state.

    Attributes:
      step: `(state, batch)` to the next state and the loss.
      init: takes a key, and the model's variables unless they are to be made from it;
        returns the first state.
    """

    step: Callable[[Any, Any], tuple[Any, jax.Array]]
    init: Callable[..., Any]


class State(NamedTuple):
    """What training changes.

    Attributes:
      params: what is trained.
      variables: all other variables of the model: statistics, or a memory.
      opt_state: the optimizer's state.
      scale: the loss scale, where `opt_state` does not hold it.
    """

    params: Any
    variables: Any
    opt_state: Any
    scale: Any = None


LossFn = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, Any]]]
"""`(params, variables, batch)` to the loss and the new variables."""


# What the ways share


def initializer(
    job: Job,
    model: nn.Module,
    tx: optax.GradientTransformation,
    scale: Callable[[], Any] = lambda: None,
) -> Callable[..., State]:
    """Returns a function that makes the first state: the `init` of a `Training`."""

    def init(key: jax.Array, variables: Any = None) -> State:
        if variables is None:
            inputs, _ = job.batch(key)
            variables = model.init(key, *inputs)
        variables = dict(variables)
        params = variables.pop("params")
        return State(params, variables, tx.init(params), scale())

    return init


def loss_function(job: Job, model: nn.Module) -> LossFn:
    """Returns the loss of a model, without any precision."""

    def loss_fn(params: Any, variables: Any, batch: Any):
        inputs, labels = batch
        outputs, variables = model.apply(
            {"params": params, **variables}, *inputs, mutable=list(variables)
        )
        return job.loss(outputs, labels), dict(variables)

    return loss_fn


def without_scale(job: Job, model: nn.Module, loss_fn: LossFn) -> Training:
    """Returns the step that every tutorial shows: gradients, update, apply."""
    tx = job.optimizer
    differentiated = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
        (loss, variables), grads = differentiated(state.params, state.variables, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, variables, opt_state), loss

    return Training(step, initializer(job, model, tx))


def under_policy(
    job: Job, policy: jaxmp.Policy, *, autocast: bool, **options: Any
) -> tuple[nn.Module, LossFn]:
    """Returns a model and its loss, under `autocast` or `apply_policy`.

    `options` are keyword arguments of the one that is called.
    """
    if autocast:
        model = job.model()
        return model, jaxmp.autocast(loss_function(job, model), policy, **options)
    model = jaxmp.apply_policy(job.model(), policy, **options)
    return model, loss_function(job, model)


# The ways


def plain(job: Job, dtype: Any = None) -> Training:
    """The model with `dtype=` by hand and nothing else; float32 without one."""
    model = job.model(dtype=dtype)
    return without_scale(job, model, loss_function(job, model))


def by_hand(job: Job, dtype: Any, *, init_scale: float = INIT_SCALE) -> Training:
    """`dtype=` by hand, and for float16 Flax's `DynamicScale`."""
    if dtype == jnp.bfloat16:
        return plain(job, dtype)
    model, tx = job.model(dtype=dtype), job.optimizer
    loss_fn = loss_function(job, model)

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
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
    """mpx's casts, loss scale and update, in mpx's own half dtype, float16."""
    import mpx  # here, so that all others can be trained without it

    model, tx = job.model(), job.optimizer
    loss_fn = loss_function(job, model)

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
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

    def loss_scale(state: State) -> Any:
        # Of arrays, as `jit(...).lower` takes no state that holds a DynamicLossScale.
        if state.scale is None:
            return jmp.NoOpLossScale()
        return jmp.DynamicLossScale(*state.scale)

    def loss_fn(params: Any, state: State, batch: Any):
        inputs, labels = batch
        params, inputs = policy.cast_to_compute((params, inputs))
        outputs, variables = model.apply(
            {"params": params, **state.variables},
            *inputs,
            mutable=list(state.variables),
        )
        loss = job.loss(policy.cast_to_output(outputs), labels)
        return loss_scale(state).scale(loss), (loss, dict(variables))

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
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
    reduce_dtype: Any = None,
    quantize: str | None = None,
    **options: Any,
) -> Training:
    """jaxmp's `autocast` or `apply_policy`, and its loss scale.

    Args:
      job: what is trained.
      dtype: what is computed in.
      autocast: whether `autocast` is called, not `apply_policy`.
      optimizer: wraps the job's own.
      param_dtype: what parameters are stored in.
      init_scale: the first loss scale, for float16.
      reduce_dtype: dtype in which gradients of weights leave their matmuls.
      quantize: how matmuls with a weight are quantised, as in `Policy.quantize`.
      **options: of `autocast` or `apply_policy`.
    """
    policy = jaxmp.Policy(
        param_dtype,
        dtype,
        jnp.float32,
        reduce_dtype=reduce_dtype,
        quantize=quantize,
    )
    tx = jaxmp.loss_scaling(optimizer(job.optimizer), policy, init_scale=init_scale)
    model, loss_fn = under_policy(job, policy, autocast=autocast, **options)
    differentiated = jaxmp.value_and_grad(loss_fn, has_aux=True)

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
        (loss, variables), grads = differentiated(
            state.params, state.variables, batch, loss_scale=state.opt_state
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        variables = jaxmp.select_applied(opt_state, variables, state.variables)
        return State(params, variables, opt_state), loss

    init = initializer(job, model, optax.identity())

    def init_in_param_dtype(key: jax.Array, variables: Any = None) -> State:
        state = init(key, variables)
        params = policy.cast_to_param(state.params)
        return state._replace(params=params, opt_state=tx.init(params))

    return Training(step, init_in_param_dtype)


def with_jaxmp_unscaled(
    job: Job,
    dtype: Any,
    *,
    autocast: bool,
    quantize: str | None = None,
    **options: Any,
) -> Training:
    """`autocast` or `apply_policy` in a step that scales no loss and skips nothing."""
    policy = jaxmp.Policy(jnp.float32, dtype, jnp.float32, quantize=quantize)
    model, loss_fn = under_policy(job, policy, autocast=autocast, **options)
    return without_scale(job, model, loss_fn)
