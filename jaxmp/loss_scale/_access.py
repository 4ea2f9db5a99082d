"""Reading and using the loss scale that an optimizer state holds."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._transformations import composition
from jaxmp.errors import MissingState
from jaxmp.loss_scale.state import find, find_state
from jaxmp.loss_scale.unscale import scale_tree

T = TypeVar("T")


def get_loss_scale(opt_state: Any) -> jax.Array:
    """Returns the loss scale that an optimizer state holds, however deep.

    Args:
      opt_state: state of `loss_scaling`, anything that contains one (a tuple, a
        `TrainState`, an `nnx.Optimizer`), or a jmp-style `LossScale`.

    Returns:
      A float32 scalar array.

    Raises:
      MissingLossScale: if there is none.
      MultipleLossScales: if there are several.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> state = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16").init(jnp.ones(2))
      >>> float(jaxmp.get_loss_scale(state))
      65536.0
    """
    return jnp.asarray(find(opt_state).loss_scale, jnp.float32)


def inner_state(opt_state: Any, kind: type | None = None) -> Any:
    """Returns the state of the optimizer inside, for Optax functions that take one.

    Args:
      opt_state: state of `loss_scaling`, with or without other wrappers of jaxmp
        inside, or anything that contains one (a `TrainState`, an `nnx.Optimizer`).
      kind: class of the state to look for, such as
        `optax.contrib.ScheduleFreeState`, if the optimizer is a chain or partition.

    Returns:
      The state of the optimizer inside `loss_scaling`, `master_weights`, `accumulate`
      and the other wrappers of jaxmp; or the one state of class `kind` in it.

    Raises:
      MissingState: if there is none, or several of the class.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.loss_scale import inner_state
      >>> tx = jaxmp.loss_scaling(optax.contrib.schedule_free_sgd(0.1), "mixed_float16")
      >>> w = jnp.ones(2)
      >>> state = inner_state(tx.init(w))
      >>> optax.contrib.schedule_free_eval_params(state, w)
      Array([1., 1.], dtype=float32)
    """
    if kind is not None:
        nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
        found = [node for node in nodes if isinstance(node, kind)]
        if len(found) != 1:
            raise MissingState(
                f"There are {len(found)} states of class {kind.__name__} in this "
                f"{type(opt_state).__name__}, and one is wanted. Pass the state of one "
                "optimizer, and the class that its init returns."
            )
        return found[0]
    wrappers = [x for x in composition.nodes(opt_state) if hasattr(x, "inner_state")]
    if not wrappers:
        raise MissingState(
            f"There is no state of jaxmp in this {type(opt_state).__name__}. Pass the "
            "state of loss_scaling(optimizer, policy), or name the class of the state "
            "that you want: inner_state(opt_state, optax.contrib.ScheduleFreeState)."
        )
    state = wrappers[0]
    while composition.is_wrapper(state):
        state = state.inner_state
    return state


def scale_loss(loss: Any, opt_state: Any) -> jax.Array:
    """Multiplies a loss by the scale, for code that calls `jax.grad` itself.

    Pass the gradients to `loss_scaling(..., grads_are_scaled=True)`. A float16 loss
    overflows at scales above 2^15, and so keeps the scale there; convert it to float32
    where it is computed, or use `jaxmp.value_and_grad`, which takes care of it.

    Args:
      loss: floating scalar.
      opt_state: anything that `get_loss_scale` takes.

    Returns:
      The scaled loss, in float32 at least.

    Raises:
      MissingLossScale: if `opt_state` holds none.
      MultipleLossScales: if it holds several.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp, optax
      >>> tx = jaxmp.loss_scaling(optax.sgd(0.5), 1024, grads_are_scaled=True)
      >>> w = jnp.float32(3)
      >>> state = tx.init(w)
      >>> grads = jax.grad(lambda w: jaxmp.scale_loss(w**2, state))(w)
      >>> updates, state = tx.update(grads, state, w)
      >>> float(optax.apply_updates(w, updates))
      0.0
    """
    return scale_tree(jnp.asarray(loss), get_loss_scale(opt_state))


def loss_scale_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Returns what is worth logging about the loss scale, as arrays on the device.

    Args:
      opt_state: anything that contains one state of `loss_scaling`.

    Returns:
      A dictionary of scalar arrays: `loss_scale` (float32, for the next step),
      `grads_finite` (bool, of the last step), `applied_steps`, `skipped_steps` and
      `consecutive_skips` (int32). With `accumulate` inside, these count micro-batches,
      and `applied_windows` and `skipped_windows` (int32) count windows.

    Raises:
      MissingLossScale: if there is none.
      MultipleLossScales: if there are several.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> state = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16").init(jnp.ones(2))
      >>> for name, x in jaxmp.loss_scale_metrics(state).items():
      ...     print(name, x)
      loss_scale 65536.0
      grads_finite True
      applied_steps 0
      skipped_steps 0
      consecutive_skips 0
    """
    state = find_state(opt_state)
    return {
        "loss_scale": state.loss_scale,
        "grads_finite": state.grads_finite,
        "applied_steps": state.applied_steps,
        "skipped_steps": state.skipped_steps,
        "consecutive_skips": state.consecutive_skips,
        **_window_counts(state.inner_state),
    }


def _window_counts(state: Any) -> dict[str, jax.Array]:
    counts = ("applied_windows", "skipped_windows")
    return {
        name: jax.tree.leaves(getattr(node, name))[0]  # nnx.Optimizer keeps Variables
        for node in composition.nodes(state)
        for name in counts
        if hasattr(node, name)
    }


def select_applied(opt_state: Any, new: T, old: T) -> T:
    """Returns `new` if the last step was applied and `old` if it was skipped.

    Use it for state outside the optimizer that a skipped step should leave alone:
    BatchNorm statistics, an average of the weights, a step counter.

    Args:
      opt_state: the state that `update` returned for the step.
      new: any pytree, as it is after the step.
      old: the same pytree, as it was before the step.

    Returns:
      One of the two, bit for bit.

    Raises:
      MissingLossScale: if `opt_state` holds none.
      MultipleLossScales: if it holds several.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")
      >>> w = jnp.ones(())
      >>> _, state = tx.update(jnp.float32(jnp.inf), tx.init(w), w)
      >>> int(jaxmp.select_applied(state, jnp.int32(8), jnp.int32(7)))
      7
    """
    return _tree.select(find_state(opt_state).consecutive_skips == 0, new, old)
