"""Tells sums, whose rounding would lose what is added to them, from other values.

A sum is updated as `a * old + increment`, with any `a`: linear attention, the delta
rule, integrators, state space models, running means. Rounding it to half would lose the
increments, so it stays float32, and those who read it round their copy. Sums are found
in the carries of loops, and in the state that a function takes and returns.

A residual stream, `x + f(x)` over the layers of a network, is a sum as well. It differs
in three properties: nothing scales what was there, but for a norm of it; `f`
reads it through something that is not linear; and there are fewer steps, those of loops
in loops multiplied, than it takes to lose a term.
"""

import math

from jaxmp._jaxpr.types import Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.sums import _updates
from jaxmp.casting.sums._updates import OLD, Use

LAYERS = 256
"""Of so many equal terms, bfloat16 loses the next."""


def is_sum(
    jaxpr: Jaxpr, index: int, out: int, length: int | None, in_backward: bool
) -> bool:
    """Whether a loop's body updates a carry as a sum.

    Args:
      jaxpr: the body.
      index: which of its inputs the carry is.
      out: which of its outputs the carry is.
      length: how often the loop runs, if that is known.
      in_backward: whether the loop is part of a backward pass, which is linear.
    """
    jaxpr = open_jaxpr(jaxpr)
    use = _updates.outputs(jaxpr, _old(jaxpr, index))[out]
    if use is None or not use.is_update or not use.increments:
        return False
    times = math.inf if length is None else length * use.times
    return not _is_stream(use, in_backward) or times >= LAYERS


def updates(jaxpr: Jaxpr, index: int, out: int) -> set[int]:
    """The ids of the equations that update a carry, those in calls included."""
    jaxpr = open_jaxpr(jaxpr)
    return {id(eqn) for eqn in _updates.path(jaxpr, _old(jaxpr, index), out)}


def is_state(jaxpr: Jaxpr, index: int, out: int) -> bool:
    """Whether a function updates an input as a sum, and returns it.

    A recurrence that is written without a loop, such as the step of a decoder, takes
    its state and returns it. One update for each call is the step of an integrator;
    more of them are the layers of a network, as in loops.

    Args:
      jaxpr: of the whole function.
      index: which of its inputs the state is.
      out: which of its outputs.
    """
    jaxpr = open_jaxpr(jaxpr)
    use = _updates.outputs(jaxpr, _old(jaxpr, index))[out]
    if use is None or not use.is_update or not use.increments:
        return False
    return use.increments == 1 or not _is_stream(use, False)


def _old(jaxpr: Jaxpr, index: int) -> list[Use | None]:
    inputs: list[Use | None] = [None] * len(jaxpr.invars)
    inputs[index] = OLD
    return inputs


def _is_stream(use: Use, in_backward: bool) -> bool:
    return not use.is_scaled and use.through >= (1 if in_backward else 2)
