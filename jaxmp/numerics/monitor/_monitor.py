"""`monitor`: statistics of a training run, kept in the optimizer's state.

    tx = monitor(loss_scaling(optax.adamw(1e-3), policy), every=100)

On every 100th step it measures gradients, updates and parameters, leaf by leaf. On
every step it counts the non-finite gradients of each leaf. That is free beside
`loss_scaling`, whose finite check is the same sum: XLA merges the two. Updates pass as
they are.

The measured step costs nothing on the others. XLA adds an optimizer's update to the
parameters where it computes it, and never writes it to memory; a branch that read the
update would make XLA write it on every step. So the branch takes what is in memory
anyway (gradients, state and parameters) and computes the update again.

Sharp edges
- It goes outermost, around `loss_scaling`. Inside, it works as well and keeps its
  record of a skipped step, but XLA may have to write what it looks at to memory first.
  Between `loss_scaling` and `accumulate` it sees zeros for the gradients of a
  non-finite micro-batch; inside `accumulate` it sees windows.
- Under `vmap`, both branches of a conditional run on every step, this one's too.
- In a `shard_map`, it sees the arrays of its device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from jaxmp import _tree
from jaxmp._jaxpr.execution import cond
from jaxmp._transformations.rounding import round_to_nearest
from jaxmp._transformations.wrapping import (
    pinned,
    require_params,
    strong_state,
    with_extra_args,
)
from jaxmp._tree import PyTree
from jaxmp.errors import NumericsError
from jaxmp.numerics.monitor._state import (
    MeasuredArrays,
    MonitorState,
    first_state,
    leaf_names,
    leaves_by_name,
)
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.ranges._statistics import stacked_statistics


def monitor(
    inner: optax.GradientTransformation, *, every: int, dtype: DTypeLike = "float16"
) -> optax.GradientTransformationExtraArgs:
    """Measures gradients, updates and parameters on every k-th step.

    It changes nothing: the parameters of a run stay the same to the last bit.

    Args:
      inner: any Optax transformation; `monitor` goes outermost, around `loss_scaling`.
      every: how many updates from one measurement to the next.
      dtype: the floating dtype in which underflow and overflow are counted.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MonitorState`, which
      `get_statistics` and `monitor_report` read, and `raise_if_collapsed` too.

    Raises:
      NumericsError: for `every` below 1, or if `dtype` is not a floating dtype.
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
            f"every={every!r} is not a number of steps. Use an integer from 1, such as "
            "monitor(tx, every=100)."
        )
    dtype = format_range(dtype).name
    inner = with_extra_args(inner)

    def init_fn(params: PyTree) -> MonitorState:
        return first_state(strong_state(inner.init(params)), params)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, MonitorState]:
        require_params(params, "monitor")
        grads, before = updates, state
        update = functools.partial(
            inner.update, grads, before.inner_state, params, **extra_args
        )

        def measure() -> MeasuredArrays:
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


def _measure(
    names: list[str],
    step: jax.Array,
    dtype: str,
    grads: PyTree,
    updates: PyTree,
    params: PyTree,
) -> MeasuredArrays:
    of_grads, of_updates, of_params = (
        leaves_by_name(names, tree) for tree in (grads, updates, params)
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


def _with_nonfinite(
    state: MonitorState, names: list[str], grads: PyTree
) -> MonitorState:
    """Remembers which leaves were non-finite, if any was.

    The sums are the same as in `all_finite`, so that XLA merges the two.
    """
    counts = jnp.stack([_count_nonfinite(x) for x in leaves_by_name(names, grads)])
    now = (state.steps, counts.astype(jnp.int32))
    before = (state.nonfinite_step, state.nonfinite)
    step, nonfinite = _tree.select(jnp.any(counts > 0), now, before)
    return state._replace(nonfinite_step=step, nonfinite=nonfinite)


def _count_nonfinite(x: jax.Array) -> jax.Array:
    return (~jnp.isfinite(_tree.at_least_float32(x))).astype(jnp.float32).sum()
