"""`get_statistics`: what a `monitor` keeps, sorted by leaf."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxmp._transformations import composition
from jaxmp.errors import MissingState
from jaxmp.numerics.monitor._state import MeasuredArrays, MonitorState, leaf_names
from jaxmp.numerics.ranges._statistics import Statistics, row

T = TypeVar("T")


class Measurement(NamedTuple):
    """What a `monitor` keeps, by the path of each parameter."""

    step: jax.Array
    """int32: the update that was measured, counted from 1; 0 before the first."""
    gradients: dict[str, Statistics]
    """Of the gradients, before clipping."""
    updates: dict[str, Statistics]
    """Of what the step added to the parameters."""
    params: dict[str, Statistics]
    """Of the parameters before the update."""
    update_ratios: dict[str, jax.Array]
    """float32: mean magnitude of the updates over mean magnitude of the parameters."""
    lost_updates: dict[str, jax.Array]
    """int32: updates that were not zero and yet left their parameter as it was."""
    nonfinite_step: jax.Array
    """int32: the last update with a non-finite gradient; 0 if there was none."""
    nonfinite: dict[str, jax.Array]
    """int32: how many gradients were non-finite in that update."""


def get_statistics(opt_state: Any) -> Measurement:
    """Returns what a `monitor` measured last, as arrays.

    Works in compiled functions, without a transfer.

    Args:
      opt_state: the state of `monitor`, or anything that contains one: a `TrainState`,
        an `nnx.Optimizer`. Of several, the outermost counts.

    Returns:
      A `Measurement`; all of it zero before the first measured step.

    Raises:
      MissingState: if `opt_state` holds no state of `monitor`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxmp.numerics import get_statistics, monitor
      >>> tx = monitor(optax.sgd(0.1), every=1)
      >>> params = {"w": jnp.ones(4)}
      >>> grads = {"w": jnp.full(4, 0.5)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(get_statistics(state).update_ratios["w"])
      0.05
    """
    state = _find_monitor(opt_state)
    measured, names = state.measured, leaf_names(state.leaves)

    def by_name(of_leaf: Callable[[Any, int], T], stacked: Any) -> dict[str, T]:
        return {name: of_leaf(stacked, i) for i, name in enumerate(names)}

    updates = by_name(row, measured.updates)
    params = by_name(row, measured.params)
    return Measurement(
        step=measured.step,
        gradients=by_name(row, measured.gradients),
        updates=updates,
        params=params,
        update_ratios={n: _ratio(updates[n].mean, params[n].mean) for n in names},
        lost_updates=by_name(_count_of, measured.lost_updates),
        nonfinite_step=state.nonfinite_step,
        nonfinite=by_name(_count_of, state.nonfinite),
    )


def _find_monitor(tree: Any) -> MonitorState:
    """The outermost state of `monitor` in a tree, with arrays for leaves."""
    for node in composition.nodes(tree):
        if isinstance(node, MonitorState):
            return _without_variables(node)
    raise MissingState(
        f"This {type(tree).__name__} holds no state of monitor(). Wrap the "
        "optimizer: monitor(loss_scaling(optax.adamw(1e-3), policy), every=100)."
    )


def _count_of(stacked: jax.Array, i: int) -> jax.Array:
    return stacked[..., i]


def _ratio(update: jax.Array, param: jax.Array) -> jax.Array:
    return jnp.where(param > 0, update / jnp.where(param > 0, param, 1), 0)


def _without_variables(state: MonitorState) -> MonitorState:
    """Unwraps the arrays that nnx.Optimizer keeps in Variables, each a pytree."""

    def plain(x: Any) -> Any:
        if isinstance(x, (MeasuredArrays, Statistics)):
            return type(x)(*map(plain, x))
        return jax.tree.leaves(x)[0]

    kept = ("inner_state", "leaves")
    arrays = {k: plain(x) for k, x in state._asdict().items() if k not in kept}
    return state._replace(**arrays)
