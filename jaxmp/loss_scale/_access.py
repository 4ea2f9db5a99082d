"""Reading a loss scale's state, in a compiled step or on the host."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._transformations import composition as _composition
from jaxmp.errors import (
    LossScaleCollapsed,
    MissingLossScale,
    MissingState,
    NotOnHost,
)
from jaxmp.loss_scale.state import (
    LOSS_FINITE,
    LOSS_NONFINITE,
    LOSS_UNKNOWN,
    LossScaleState,
    find,
)
from jaxmp.loss_scale.state_machines import check_count
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
      opt_state: state of `loss_scaling`, with other wrappers of jaxmp inside of it or
        not, or anything that contains one (a `TrainState`, an `nnx.Optimizer`).
      kind: the class of the state that is wanted, such as
        `optax.contrib.ScheduleFreeState`, where the optimizer is a chain or partition.

    Returns:
      What the optimizer that jaxmp wraps keeps itself, inside of `loss_scaling`,
      `master_weights`, `accumulate`, ...; or the one state of class `kind` in it.

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
    wrappers = [x for x in _composition.nodes(opt_state) if hasattr(x, "inner_state")]
    if not wrappers:
        raise MissingState(
            f"There is no state of jaxmp in this {type(opt_state).__name__}. Pass the "
            "state of loss_scaling(optimizer, policy), or name the class of the state "
            "that is wanted: inner_state(opt_state, optax.contrib.ScheduleFreeState)."
        )
    state = wrappers[0]
    while _composition.is_wrapper(state):
        state = state.inner_state
    return state


def scale_loss(loss: Any, opt_state: Any) -> jax.Array:
    """Multiplies a loss by the scale, for those who call `jax.grad` themselves.

    Give the gradients to `loss_scaling(..., grads_are_scaled=True)`. A loss of dtype
    float16 keeps the scale at 2^15 or below by overflowing above it; convert it to
    float32 where it is computed, or use `jaxmp.value_and_grad`, which sees to that.

    Args:
      loss: floating scalar.
      opt_state: whatever `get_loss_scale` takes.

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
    """Returns what is worth logging about the loss scale, without a transfer.

    Args:
      opt_state: anything that contains one state of `loss_scaling`.

    Returns:
      A dictionary of scalar arrays: `loss_scale` (float32, for the next step),
      `grads_finite` (bool, of the last step), `applied_steps`, `skipped_steps` and
      `consecutive_skips` (int32). Under `accumulate` these count micro-batches, and
      `applied_windows` and `skipped_windows` (int32) are there too.

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
    state = _find_state(opt_state)
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
        for node in _composition.nodes(state)
        for name in counts
        if hasattr(node, name)
    }


def select_applied(opt_state: Any, new: T, old: T) -> T:
    """Returns `new` if the last step was applied and `old` if it was skipped.

    For what the optimizer does not hold and a skipped step should leave alone:
    BatchNorm statistics, an average of the weights, a counter of steps.

    Args:
      opt_state: the state that `update` returned for the step.
      new: any pytree of after the step.
      old: the same pytree of before the step.

    Returns:
      One of the two, leaf by leaf and bit by bit.

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
    return _tree.select(_find_state(opt_state).consecutive_skips == 0, new, old)


def raise_if_collapsed(opt_state: Any, *, max_consecutive_skips: int) -> None:
    """Raises on the host if too many steps in a row were skipped.

    It waits for the step that made the state: call it every now and then.

    Args:
      opt_state: anything that contains one state of `loss_scaling`. For an ensemble
        under `vmap`, the worst member counts.
      max_consecutive_skips: how many skips in a row are too many. A dynamic scale that
        starts at 2^16 finds its place within 17.

    Raises:
      LossScaleOptionError: if `max_consecutive_skips` is below 1.
      LossScaleCollapsed: with the cause, as far as the state knows it. It knows more if
        `update` is given `value=loss`, and which gradients were non-finite if there is
        a `jaxmp.numerics.monitor` around the optimizer.
      NotOnHost: if called in a compiled function.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> state = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16").init(jnp.ones(2))
      >>> jaxmp.raise_if_collapsed(state, max_consecutive_skips=50)
    """
    check_count("max_consecutive_skips", max_consecutive_skips)
    state = _find_state(opt_state)
    try:
        skips = np.ravel(np.asarray(state.consecutive_skips))
    except jax.errors.TracerArrayConversionError:
        raise NotOnHost(
            "raise_if_collapsed() reads values and was called in a compiled function. "
            "Call it outside of jit, on the state that the step returned."
        ) from None
    worst = int(skips.argmax())
    if skips[worst] < max_consecutive_skips:
        return
    scale = np.ravel(np.asarray(state.loss_scale))[worst]
    loss_finite = np.ravel(np.asarray(state.loss_finite))[worst]
    member = f" (ensemble member {worst})" if skips.size > 1 else ""
    raise LossScaleCollapsed(
        f"The last {skips[worst]} steps were all skipped{member}; the loss scale is "
        f"now {scale:g}. {_CAUSES[int(loss_finite)]}{_culprits(opt_state, worst)}"
    )


def _culprits(opt_state: Any, member: int) -> str:
    """Which gradients were non-finite, where somebody has written it down."""
    leaves = _composition.nonfinite_leaves(opt_state, member)
    if not leaves:
        return ""
    worst_first = sorted(leaves.items(), key=lambda item: -item[1])
    shown = [f"{path} ({count})" for path, count in worst_first[:_MOST_SHOWN]]
    if len(leaves) > _MOST_SHOWN:
        shown.append(f"and {len(leaves) - _MOST_SHOWN} more leaves")
    return f" Non-finite gradients in the last skipped step: {', '.join(shown)}."


_MOST_SHOWN = 10


_CAUSES = {
    LOSS_NONFINITE: (
        "The loss itself was non-finite: the forward pass already overflowed or "
        "divided by zero, and no loss scale can help. Look at the learning rate, the "
        "batch and the parameters, or compute in bfloat16, which has float32's range."
    ),
    LOSS_FINITE: (
        "The loss was finite and only gradients overflowed. If the scale still falls, "
        "let it, or start lower with init_scale=; if it stands at min_scale, lower "
        "min_scale (it may be below 1) or compute in bfloat16, which has float32's "
        "range."
    ),
    LOSS_UNKNOWN: (
        "Whether the loss itself was non-finite is not known: pass it, as "
        "update(grads, state, params, value=loss). A non-finite loss means that the "
        "forward pass overflowed, which no loss scale can help; a finite one, that "
        "only gradients did, which a lower min_scale= or bfloat16 can."
    ),
}


def _find_state(opt_state: Any) -> LossScaleState:
    state = find(opt_state)
    if not isinstance(state, LossScaleState):
        raise MissingLossScale(
            f"A {type(state).__name__} counts no steps. Pass the state of an optimizer "
            "made by jaxmp.loss_scaling(optimizer, policy)."
        )
    return state
