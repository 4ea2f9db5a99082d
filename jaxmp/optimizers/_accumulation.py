"""`accumulate`: one update from the gradients of several micro-batches.

    tx = loss_scaling(master_weights(accumulate(optax.adamw(1e-3), every_k=4)), policy)

Gradients are summed in float32. They are true gradients, so the loss scale may change
within a window. A non-finite micro-batch is dropped or costs its window; you choose.

If the whole window fits one compiled step, `jaxmp.value_and_grad(..., micro_batches=k)`
is cheaper: it runs the optimizer once per window, while `accumulate` runs it on every
micro-batch, with a select behind it.

Sharp edges
- Put whatever changes the update inside: `chain(accumulate(adam, 4), add_decayed_...)`
  would decay on every micro-batch, and `loss_scaling` refuses state beside
  `accumulate`. A clip before it clips every micro-batch; a clip inside clips the mean.
- Each micro-batch is checked for non-finite gradients: by `accumulate` if it stands
  alone, by `loss_scaling`, over all devices, if that stands around it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp import _tree
from jaxmp._jaxpr.fp8_metadata import overwritten
from jaxmp._transformations import composition
from jaxmp._transformations.wrapping import (
    LOSS_SCALING_OUTERMOST,
    OWN_COLLECTION,
    float32_view,
    pinned,
    strong_state,
    with_extra_args,
)
from jaxmp._tree import PyTree
from jaxmp.errors import OptimizerOptionError

_REPAIRS = {
    "loss_scaling": LOSS_SCALING_OUTERMOST,
    "master_weights": (
        "It would see float32 parameters there, and keep no copy of them. Swap them: "
        "master_weights(accumulate(optax.adamw(1e-3), 4))."
    ),
    "stochastic_rounding": (
        "It would see float32 parameters there, and round nothing. Swap them: "
        "stochastic_rounding(accumulate(optax.adamw(1e-3), 4), seed=0)."
    ),
    OWN_COLLECTION: (
        "Scales are not averaged over a window, and accumulate knows Flax's collection "
        "alone. Swap them: overwrite_with_gradient(accumulate(optax.adamw(1e-3), 4), "
        "collection=...)."
    ),
}

SKIP_MICRO, SKIP_WINDOW = "skip_micro", "skip_window"


class AccumulationState(NamedTuple):
    """State of `accumulate`."""

    inner_state: optax.OptState
    """State of the inner optimizer, as of the last applied window."""
    grad_sums: PyTree
    """Sums over the finite micro-batches of this window, float32 at least; of FP8
    metadata, the largest values."""
    value_sum: jax.Array
    """float32: sum of `value=` over the same micro-batches, if it is passed."""
    micro_step: jax.Array
    """int32: micro-batches of this window so far."""
    finite_micro_steps: jax.Array
    """int32: finite micro-batches of this window so far."""
    applied_windows: jax.Array
    """int32: windows that moved the parameters."""
    skipped_windows: jax.Array
    """int32: windows that changed nothing."""

    transformation = "accumulate"
    decides_on_nonfinite = True


def accumulate(
    inner: optax.GradientTransformation,
    every_k: int,
    *,
    on_nonfinite: str = SKIP_MICRO,
) -> optax.GradientTransformationExtraArgs:
    """Updates on every k-th call, with the mean of the gradients since the last time.

    In between, updates are -0.0, which changes no number, and the inner
    state stands still.

    Args:
      inner: any Optax transformation. It sees float32 parameters and gradients, and the
        mean of the losses if `update` is passed `value=loss`.
      every_k: micro-batches in a window.
      on_nonfinite: what a non-finite micro-batch costs. `"skip_micro"` drops it and
        updates with the mean of the others; `"skip_window"` drops the whole window. A
        window without a finite micro-batch is skipped in either case.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `AccumulationState`.
      Its `update` takes `grads_finite=`, which `loss_scaling` passes, and checks the
      gradients itself if it is not given.

    Raises:
      OptimizerOptionError: for `every_k` below 1 or another `on_nonfinite`.
      TransformationOrder: from `init`, if `inner` contains a loss scale, master weights
        or stochastic rounding, which go around it.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> tx = jaxmp.accumulate(optax.sgd(1.0), 4)
      >>> w = jnp.float32(10)
      >>> state = tx.init(w)
      >>> for grad in (1.0, jnp.nan, 3.0, 5.0):
      ...     updates, state = tx.update(jnp.float32(grad), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> float(w), int(state.applied_windows)
      (7.0, 1)
    """
    inner = with_extra_args(inner)
    _check_options(every_k, on_nonfinite)

    def init_fn(params: optax.Params) -> AccumulationState:
        weights = float32_view(params)
        inner_state = strong_state(inner.init(weights))
        composition.refuse_inside("accumulate", inner_state, _REPAIRS)
        return AccumulationState(
            inner_state=inner_state,
            grad_sums=optax.tree_utils.tree_zeros_like(_fast(weights)),
            value_sum=jnp.zeros((), jnp.float32),
            micro_step=jnp.zeros((), jnp.int32),
            finite_micro_steps=jnp.zeros((), jnp.int32),
            applied_windows=jnp.zeros((), jnp.int32),
            skipped_windows=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grads_finite: jax.Array | None = None,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulationState]:
        composition.require_state(state, AccumulationState, "accumulate")
        grads = float32_view(updates)
        finite = _all_finite(grads) if grads_finite is None else grads_finite
        state = _add(state, grads, value, finite)
        ends = state.micro_step == every_k
        enough = 1 if on_nonfinite == SKIP_MICRO else every_k
        applies = ends & (state.finite_micro_steps >= enough)

        means, value_mean = _means(state)
        if value is not None:
            extra_args["value"] = value_mean
        updates, inner_state = inner.update(
            means, state.inner_state, float32_view(params), **extra_args
        )
        nothing = jax.tree.map(_tree.negative_zero, updates)
        inner_state = pinned(inner_state, state.inner_state)
        inner_state = _tree.select(applies, inner_state, state.inner_state)
        state = state._replace(
            inner_state=inner_state,
            applied_windows=state.applied_windows + applies.astype(jnp.int32),
            skipped_windows=state.skipped_windows + (ends & ~applies).astype(jnp.int32),
        )
        return _tree.select(applies, updates, nothing), _cleared_if(ends, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _all_finite(grads: PyTree) -> jax.Array:
    leaves = zip(jax.tree.leaves(grads), overwritten(grads), strict=True)
    return _tree.all_finite([x for x, is_metadata in leaves if not is_metadata])


def _add(
    state: AccumulationState, grads: PyTree, value: Any, finite: jax.Array
) -> AccumulationState:
    sums = (state.grad_sums, state.value_sum)
    value = 0.0 if value is None else jnp.asarray(value, jnp.float32)
    added = pinned((_combined(state.grad_sums, grads), state.value_sum + value), sums)
    grad_sums, value_sum = _tree.select(finite, added, sums)
    return state._replace(
        grad_sums=grad_sums,
        value_sum=value_sum,
        micro_step=state.micro_step + 1,
        finite_micro_steps=state.finite_micro_steps + finite.astype(jnp.int32),
    )


def _combined(totals: PyTree, grads: PyTree) -> PyTree:
    """Adds gradients to their sums, and takes the larger of two FP8 scales."""

    def combined(total: Any, x: Any, is_metadata: bool) -> Any:
        if not _tree.is_inexact(total):
            return total
        # Flax's own rule for scales and magnitudes that several calls share.
        return jnp.maximum(total, x) if is_metadata else total + x

    leaves, structure = jax.tree.flatten(totals)
    of_grads = structure.flatten_up_to(grads)
    new = map(combined, leaves, of_grads, overwritten(totals))
    return jax.tree.unflatten(structure, new)


def _means(state: AccumulationState) -> tuple[PyTree, jax.Array]:
    count = jnp.maximum(state.finite_micro_steps, 1)

    def mean(total: Any, is_metadata: bool = False) -> Any:
        if is_metadata or not _tree.is_inexact(total):
            return total
        return total / count.astype(total.dtype)

    leaves, structure = jax.tree.flatten(state.grad_sums)
    means = map(mean, leaves, overwritten(state.grad_sums))
    return jax.tree.unflatten(structure, means), mean(state.value_sum)


def _cleared_if(ends: jax.Array, state: AccumulationState) -> AccumulationState:
    of_window = {
        name: getattr(state, name)
        for name in ("grad_sums", "value_sum", "micro_step", "finite_micro_steps")
    }
    cleared = jax.tree.map(jnp.zeros_like, of_window)
    return state._replace(**_tree.select(ends, cleared, of_window))


def _fast(params: PyTree) -> PyTree:
    """The part of the parameters that has gradients, under `optax.lookahead`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _check_options(every_k: Any, on_nonfinite: str) -> None:
    if isinstance(every_k, bool) or not isinstance(every_k, int) or every_k < 1:
        raise OptimizerOptionError(
            f"every_k={every_k!r} is not a number of micro-batches. Use an integer of "
            "at least 1."
        )
    if on_nonfinite not in (SKIP_MICRO, SKIP_WINDOW):
        raise OptimizerOptionError(
            f"on_nonfinite={on_nonfinite!r} is neither {SKIP_MICRO!r}, which drops the "
            f"micro-batch, nor {SKIP_WINDOW!r}, which drops its window."
        )
