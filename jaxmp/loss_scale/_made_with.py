"""What a loss scale was made with, which its state of plain arrays does not say.

A transformation is a pair of closures. `init` of `loss_scaling` carries the note as an
attribute, and is found in the closures of the transformations around it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from jaxmp.loss_scale._state_machines import Machine
from jaxmp.policy import Policy

F = TypeVar("F", bound=Callable[..., Any])

_DEEPEST = 12


class MadeWith(NamedTuple):
    """One loss scale of an optimizer."""

    policy: Policy | None
    """The policy that chose the scale; None if the user chose it without one."""
    machine: Machine
    """How the scale moves."""


def note(init: F, made_with: MadeWith) -> F:
    """Writes on `init` of a transformation what its loss scale was made with."""
    vars(init)["made_with"] = made_with
    return init


def notes(tx: Any) -> list[MadeWith]:
    """Lists the loss scales of an optimizer, as far as its closures show them.

    Args:
      tx: an Optax transformation.

    Returns:
      One for each scale. What makes its transformations as late as in `init`, as
      `optax.inject_hyperparams`, hides them.
    """
    return list(_search(tx.init, _DEEPEST, set()))


def _search(x: Any, depth: int, seen: set[int]) -> Iterator[MadeWith]:
    if id(x) in seen or depth == 0:
        return
    seen.add(id(x))
    found = getattr(x, "made_with", None)
    if isinstance(found, MadeWith):
        yield found
        return
    for part in _parts(x):
        yield from _search(part, depth - 1, seen)


def _parts(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list)):
        yield from x
    elif isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif callable(x):
        yield getattr(x, "__self__", None)
        yield getattr(x, "__wrapped__", None)
        for cell in getattr(x, "__closure__", None) or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not yet assigned
                continue
