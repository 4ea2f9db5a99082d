"""`monitor`: statistics of a training run, kept in the optimizer's state.

    tx = monitor(loss_scaling(optax.adamw(1e-3), policy), every=100)

On every 100th step it measures gradients, updates and parameters, leaf by leaf. On
every step it counts the non-finite gradients of each leaf, which costs what the finite
check of `loss_scaling` costs, and nothing beside it: XLA makes one of the two. Updates
pass as they are.

How the measured step costs nothing on other steps: an optimizer's update is never
written to memory, since XLA adds it to the parameters where it computes it. A branch
that looked at it would make XLA write it, on every step. The branch therefore takes
what is in memory anyway (gradients, state and parameters) and computes the update once
more.

Sharp edges
- It goes outermost, around `loss_scaling`. Inside, it works as well and keeps its
  record of a skipped step, but what it looks at there may have to be written to memory
  first. Between `loss_scaling` and `accumulate` it is shown zeros in place of the
  gradients of a non-finite micro-batch; within `accumulate`, windows.
- Under `vmap`, both branches of every conditional run, this one's on every step too.
- In `shard_map`, it sees the arrays of its device.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import _tree
from jaxmp._jaxpr.execution import cond
from jaxmp._transformations.rounding import round_to_nearest
from jaxmp._transformations.wrapping import (
    pinned,
    require_params,
    strong_state,
    with_extra_args,
)
from jaxmp.errors import NumericsError
from jaxmp.numerics._formats import format_range
from jaxmp.numerics._statistics import (
    Statistics,
    has_range,
    leaf_path,
    row,
    stacked_statistics,
)

PyTree = Any


class MeasuredArrays(NamedTuple):
    """What was measured last; every array has an axis of leaves."""

    step: jax.Array
    """int32: which update it was, counted from 1; 0 before the first."""
    gradients: Statistics
    updates: Statistics
    params: Statistics
    lost_updates: jax.Array


class MonitorState(NamedTuple):
    """State of `monitor`; `get_statistics` sorts it by leaf."""

    inner_state: optax.OptState
    """State of what it watches."""
    leaves: PyTree
    """The tree of the parameters without the parameters, for the leaves' names."""
    steps: jax.Array
    """int32: updates so far, skipped ones included."""
    measured: MeasuredArrays
    """What was measured last."""
    nonfinite_step: jax.Array
    """int32: the last update that was given a non-finite gradient; 0 if none was."""
    nonfinite: jax.Array
    """int32 [leaves]: how many gradients were non-finite in it; above 2^24, about."""

    transformation = "monitor"
    forwards_decision = True
    records_skipped_steps = True

    def nonfinite_leaves(self, member: int = 0) -> dict[str, int]:
        """Names the leaves that were non-finite in the last skipped step, on the host.

        Args:
          member: of an ensemble under `vmap`.
        """
        names = leaf_names(self.leaves)
        counts = np.asarray(jax.tree.leaves(self.nonfinite)[0])
        if counts.ndim > 1:
            counts = counts.reshape(-1, len(names))[member]
        return {n: int(k) for n, k in zip(names, counts, strict=True) if k}


def monitor(
    inner: optax.GradientTransformation, *, every: int, dtype: Any = "float16"
) -> optax.GradientTransformationExtraArgs:
    """Measures gradients, updates and parameters on every k-th step.

    It changes nothing: the parameters of a run stay the same to the last bit.

    Args:
      inner: any Optax transformation; this one goes outermost, around `loss_scaling`.
      every: how many updates from one measurement to the next.
      dtype: the floating dtype in which underflow and overflow are asked about.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MonitorState`, which
      `get_statistics` and `monitor_report` read, and `raise_if_collapsed` too.

    Raises:
      NumericsError: for `every` below 1, or if `dtype` is no floating dtype.
      MissingParams: from `update` without parameters.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.numerics import get_statistics, monitor
      >>> tx = monitor(jaxmp.loss_scaling(optax.sgd(1e-4), "mixed_bfloat16"), every=2)
      >>> params = {"w": jnp.ones(4)}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     grads = {"w": jnp.array([0.0, 1e-9, 1e-4, 2.0])}
      ...     updates, state = tx.update(grads, state, params)
      >>> found = get_statistics(state)
      >>> print(found.step, found.gradients["w"].underflows, found.lost_updates["w"])
      2 1 2
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise NumericsError(
            f"every={every!r} is no number of steps. Use an integer from 1, such as "
            "monitor(tx, every=100)."
        )
    dtype = format_range(dtype).name
    inner = with_extra_args(inner)

    def init_fn(params):
        inner_state = strong_state(inner.init(params))
        leaves = jax.tree.map(_name_only, _fast(params))
        count = len(leaf_names(leaves))
        return MonitorState(
            inner_state=inner_state,
            leaves=leaves,
            steps=jnp.zeros((), jnp.int32),
            measured=_nothing_measured(count),
            nonfinite_step=jnp.zeros((), jnp.int32),
            nonfinite=jnp.zeros(count, jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params, "monitor")
        grads, before = updates, state
        update = functools.partial(
            inner.update, grads, before.inner_state, params, **extra_args
        )

        def measure():
            again, _ = update()
            return _measure(names, state.steps, dtype, grads, again, params)

        names = leaf_names(state.leaves)
        state = state._replace(steps=state.steps + np.int32(1))
        if names:
            is_due = state.steps % np.int32(every) == 0
            measured = cond(is_due, measure, lambda: before.measured)
            state = state._replace(measured=measured)
            state = _with_nonfinite(state, names, grads)
        updates, inner_state = update()
        inner_state = pinned(inner_state, before.inner_state)
        return updates, state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# One update


def _measure(
    names: list[str],
    step: jax.Array,
    dtype: Any,
    grads: PyTree,
    updates: PyTree,
    params: PyTree,
) -> MeasuredArrays:
    of_grads, of_updates, of_params = (
        _leaves(names, tree) for tree in (grads, updates, params)
    )
    lost = [_lost(p, u) for p, u in zip(of_params, of_updates, strict=True)]
    everything = stacked_statistics([*of_grads, *of_updates, *of_params], dtype)
    gradients, updates, params = (
        jax.tree.map(
            lambda x, i=i: x[i * len(names) : (i + 1) * len(names)], everything
        )
        for i in range(3)
    )
    return MeasuredArrays(
        step=step,
        gradients=gradients,
        updates=updates,
        params=params,
        lost_updates=jnp.stack(lost),
    )


def _with_nonfinite(state: MonitorState, names: list[str], grads: Any) -> MonitorState:
    """Remembers which leaves were non-finite, if any was.

    The sums are those of `all_finite`, so that XLA computes one of the two.
    """
    counts = jnp.stack([_count_nonfinite(x) for x in _leaves(names, grads)])
    now = (state.steps, counts.astype(jnp.int32))
    before = (state.nonfinite_step, state.nonfinite)
    step, nonfinite = _tree.select(jnp.any(counts > 0), now, before)
    return state._replace(nonfinite_step=step, nonfinite=nonfinite)


def _count_nonfinite(x: Any) -> jax.Array:
    return (~jnp.isfinite(_tree.at_least_float32(x))).astype(jnp.float32).sum()


def _lost(p: jax.Array, update: jax.Array) -> jax.Array:
    """Counts the updates that `optax.apply_updates` would add without effect."""
    if p.shape != update.shape:
        return jnp.zeros((), jnp.int32)
    moved = p + update
    if p.dtype in _tree.HALF:
        # XLA may drop a cast to half and back, and would then count nothing.
        moved, p = (
            round_to_nearest(moved.astype(jnp.float32), p.dtype),
            p.astype(jnp.float32),
        )
    is_lost = (update != 0) & (moved.astype(p.dtype) == p)
    return jnp.sum(is_lost, dtype=jnp.int32)


# Leaves


def _name_only(x: Any) -> Any:
    return optax.EmptyState() if has_range(x) else ()


def _is_name(x: Any) -> bool:
    return isinstance(x, optax.EmptyState)


def _fast(params: PyTree) -> PyTree:
    """The part of the parameters that has gradients, under `optax.lookahead`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def leaf_names(leaves: PyTree) -> list[str]:
    """The paths of the leaves that are watched, in the order of the state's arrays."""
    nodes = jax.tree_util.tree_leaves_with_path(leaves, is_leaf=_is_name)
    return [leaf_path(path) for path, x in nodes if _is_name(x)]


def _leaves(names: list[str], tree: PyTree) -> list[jax.Array]:
    """The arrays of a tree in the order of the state's; an empty one for a missing."""
    nothing = jnp.zeros(0, jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(_fast(tree))
    found = {leaf_path(path): x for path, x in leaves if has_range(x)}
    return [jnp.asarray(found.get(name, nothing)) for name in names]


def _nothing_measured(count: int) -> MeasuredArrays:
    def zeros(x):
        return jnp.zeros((count, *x.shape), x.dtype)

    nothing = jax.eval_shape(lambda: row(stacked_statistics([jnp.zeros(0)]), 0))
    return MeasuredArrays(
        step=jnp.zeros((), jnp.int32),
        gradients=jax.tree.map(zeros, nothing),
        updates=jax.tree.map(zeros, nothing),
        params=jax.tree.map(zeros, nothing),
        lost_updates=jnp.zeros(count, jnp.int32),
    )
