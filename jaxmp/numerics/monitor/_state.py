"""`MonitorState`: what a `monitor` keeps, in arrays with an axis of leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp._jaxpr.types import Array
from jaxmp._tree import PyTree
from jaxmp.numerics.ranges._statistics import (
    Statistics,
    has_range,
    leaf_path,
    row,
    stacked_statistics,
)


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


def first_state(inner_state: optax.OptState, params: PyTree) -> MonitorState:
    """The state before the first step."""
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


def _nothing_measured(count: int) -> MeasuredArrays:
    nothing = jax.eval_shape(lambda: row(stacked_statistics([jnp.zeros(0)]), 0))

    def zeros() -> Statistics:
        return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), nothing)

    return MeasuredArrays(
        step=jnp.zeros((), jnp.int32),
        gradients=zeros(),
        updates=zeros(),
        params=zeros(),
        lost_updates=jnp.zeros(count, jnp.int32),
    )


def leaf_names(leaves: PyTree) -> list[str]:
    """The paths of the leaves that are watched, in the order of the state's arrays."""
    nodes = jax.tree_util.tree_leaves_with_path(leaves, is_leaf=_is_name)
    return [leaf_path(path) for path, x in nodes if _is_name(x)]


def leaves_by_name(names: list[str], tree: PyTree) -> list[jax.Array]:
    """The arrays of a tree in the order of the names; an empty one for a missing."""
    nothing = jnp.zeros(0, jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(_fast(tree))
    found = {leaf_path(path): x for path, x in leaves if has_range(x)}
    return [jnp.asarray(found.get(name, nothing)) for name in names]


def _fast(params: PyTree) -> PyTree:
    """The part of the parameters that has gradients, under `optax.lookahead`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _name_only(x: Array) -> Any:
    return optax.EmptyState() if has_range(x) else ()


def _is_name(x: Any) -> bool:
    return isinstance(x, optax.EmptyState)
