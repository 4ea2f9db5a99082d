"""How jaxmp's Optax transformations recognise each other when nested.

A transformation is a pair of closures, so what it wraps shows only in the state that
`init` returns. Every state class of jaxmp therefore carries a few class attributes,
which are static and not part of the pytree:

    transformation = "accumulate"     the name that a user wrote
    decides_on_nonfinite = True       it handles a non-finite step itself
    forwards_decision = True          it may stand around one that does
    lands_on_half = True              no update of a half-precision weight is lost
    records_skipped_steps = True      what it notes beside `inner_state` is kept even
                                      if the step is skipped; it moves no parameter

Your own state classes may carry them too. `decides_on_nonfinite` is a promise: the
transformation takes `grads_finite=` and ignores the gradients where it is False. So is
`forwards_decision`: the transformation passes `grads_finite=` on, and an update of -0.0
from inside leaves its own state and the parameters as they are.
A state that records skipped steps may have a method `nonfinite_leaves(member)`, which
counts, on the host, the non-finite gradients of each leaf in the last skipped step.
"""

from collections.abc import Iterator
from typing import Any

import jax

from jaxmp import _tree
from jaxmp.errors import MissingState, TransformationOrder


def nodes(state: Any) -> Iterator[Any]:
    """Yields the state of every jaxmp transformation in a tree, outermost first."""
    for node in jax.tree.leaves(state, is_leaf=_is_ours):
        if _is_ours(node):
            yield node
            yield from nodes(tuple(node))


def names(state: Any) -> list[str]:
    """Names the jaxmp transformations that made a state, outermost first."""
    return [node.transformation for node in nodes(state)]


def decides_on_nonfinite(state: Any) -> bool:
    """Whether a transformation in a state handles non-finite steps itself."""
    return any(getattr(node, "decides_on_nonfinite", False) for node in nodes(state))


def lands_on_half(state: Any) -> bool:
    """Whether a transformation in a state saves updates that half weights lose."""
    return any(getattr(node, "lands_on_half", False) for node in nodes(state))


def select(pred: jax.Array, new: Any, old: Any) -> Any:
    """Takes one of two states; a record of skipped steps is always the new one."""

    def records(node: Any) -> bool:
        return getattr(node, "records_skipped_steps", False)

    def select_node(new: Any, old: Any) -> Any:
        if records(new):
            inner_state = select(pred, new.inner_state, old.inner_state)
            return new._replace(inner_state=inner_state)
        return _tree.select(pred, new, old)

    return jax.tree.map(select_node, new, old, is_leaf=records)


def nonfinite_leaves(state: Any, member: int) -> dict[str, int]:
    """Counts the non-finite gradients of each leaf in the last skipped step.

    Args:
      state: anything that holds states.
      member: index in an ensemble under `vmap`.

    Returns:
      Counts by path; empty if no state has recorded them.
    """
    recorders = (x for x in nodes(state) if hasattr(x, "nonfinite_leaves"))
    return next(filter(None, (x.nonfinite_leaves(member) for x in recorders)), {})


def require_state(state: Any, cls: type, name: str) -> None:
    """Raises unless `update` was given the state that its own `init` makes.

    Args:
      state: the state given to `update`.
      cls: the class that `init` makes.
      name: name of the transformation.

    Raises:
      MissingState: naming both, with the repair.
    """
    if isinstance(state, cls):
        return
    found = names(state)
    holds = f" that holds the state of {found[0]}()" if found else ""
    raise MissingState(
        f"{name}() was updated with a {type(state).__name__}{holds} in place of its "
        f"{cls.__name__}. Pass the state that this transformation's init made: "
        f"state = tx.init(params).{_adopting(cls, name)}"
    )


def _adopting(cls: Any, name: str) -> str:
    if "inner_state" not in cls._fields:
        return ""
    return (
        f" To go on with the state of an optimizer that ran without {name}(): "
        "tx.init(params)._replace(inner_state=state)."
    )


def refuse_inside(outer: str, state: Any, repairs: dict[str, str]) -> None:
    """Raises if a transformation that cannot work inside `outer` made `state`.

    Args:
      outer: name of the transformation that is being initialised.
      state: state of the transformation that it wraps.
      repairs: what to write instead, for each name that may not stand inside.

    Raises:
      TransformationOrder: naming both, with the repair.
    """
    for inner in names(state):
        if inner in repairs:
            raise TransformationOrder(
                f"{inner}() stands inside {outer}(), where it cannot work. "
                f"{repairs[inner]}"
            )


def refuse_beside_decision(state: Any) -> None:
    """Raises if a state beside the deciding transformation would move on a bad step.

    Where one transformation handles non-finite steps, those beside it see a gradient of
    zero on such a step, and would decay and count on it.
    """
    if not decides_on_nonfinite(state):
        return
    undecided = list(_undecided(state))
    if undecided:
        raise TransformationOrder(
            f"{undecided[0]!r} is state beside accumulate() and would move on every "
            "micro-batch, dropped ones included. Put what has state inside: "
            "accumulate(optax.chain(optax.trace(0.9), optax.adamw(1e-3)), every_k=4)."
        )


def _undecided(state: Any) -> Iterator[str]:
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_ours)
    for path, node in leaves:
        if getattr(node, "forwards_decision", False):
            yield from _undecided(node.inner_state)
        elif not getattr(node, "decides_on_nonfinite", False):
            yield _tree.path_string(path)


def is_wrapper(node: Any) -> bool:
    """Whether this is the state of a jaxmp transformation around another one."""
    return _is_ours(node) and hasattr(node, "inner_state")


def _is_ours(node: Any) -> bool:
    return isinstance(getattr(node, "transformation", None), str)
