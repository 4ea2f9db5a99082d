"""Which carries of a loop are wanted low, which are sums, and how they enter.

A carry that reaches a matmul in the body, in this iteration or through another carry in
a later one, is a hidden state or a residual stream: it is carried in half. Any other is
a statistic, and stays float32. So do a sum, `a * old + increment`, whoever reads it
(`casting/sums` tells it from a residual stream), and a parameter that the loop updates
by gradients which it takes itself.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.calls import Loop, loop
from jaxmp._jaxpr.types import Eqn, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.plan.plan import Context, JaxprPlan
from jaxmp.casting.plan.states import (
    FLOAT32,
    KEPT,
    NEUTRAL,
    Kind,
    State,
    traced_state,
)
from jaxmp.casting.planner._interface import Planner

_STAYS = frozenset((Kind.PINNED, Kind.KEPT))


class Carries(NamedTuple):
    """What is known about the carries of a loop before their states are.

    Attributes:
      wants: which are wanted low.
      sums: which are sums that would be wanted low, but are not.
      inputs: which inputs of the body are wanted low.
      context: of the body, with the equations that update the sums.
    """

    wants: tuple[bool, ...]
    sums: tuple[bool, ...]
    inputs: tuple[bool, ...]
    context: Context


def find_carries(
    eqn: Eqn, results: Sequence[bool], planner: Planner, context: Context
) -> Carries:
    """Finds which carries of a loop are wanted low: the least fixed point of the body.

    Args:
      eqn: a `scan` or a `while`.
      results: which of its results are wanted low; those of carries do not count.
      planner: of the body.
      context: of the body.
    """
    read = loop(eqn)
    others = tuple(results[read.carries :])
    sums = (False,) * read.carries
    wants = _fixed_point(read, others, sums, planner, context)
    wanted = planner.wants(read.body, (*wants, *others), context).values
    decided = planner.user.carry_dtype(eqn, context)
    updates = context.updates

    def is_sum(i: int) -> bool:
        nonlocal updates
        if decided is not None:
            return decided == FLOAT32
        index = read.consts + i
        found = planner.updates(read.body, index, i, read.length, context)
        updates |= found
        return bool(found)

    outs = open_jaxpr(read.body).outvars
    sums = tuple(
        traced_state(v) is NEUTRAL
        and not is_literal(out)
        and (v in wanted or out in wanted)
        and is_sum(i)
        for i, (v, out) in enumerate(zip(read.carried(), outs, strict=False))
    )
    if any(sums):
        context = context._replace(updates=updates)
        wants = _fixed_point(read, others, sums, planner, context)
    inputs = list(planner.wants(read.body, (*wants, *others), context).inputs)
    inputs[read.consts : read.consts + read.carries] = wants
    return Carries(wants, sums, tuple(inputs), context)


def _fixed_point(
    read: Loop,
    others: tuple[bool, ...],
    sums: tuple[bool, ...],
    planner: Planner,
    context: Context,
) -> tuple[bool, ...]:
    """The fewest carries wanted low, such that what they are made of is so as well."""
    found = (False,) * read.carries
    while True:
        inputs = planner.wants(read.body, (*found, *others), context).inputs
        inputs = inputs[read.consts : read.consts + read.carries]
        grown = tuple(
            (a or b) and not is_sum
            for a, b, is_sum in zip(found, inputs, sums, strict=True)
        )
        if grown == found:
            return found
        found = grown


def entering(
    states: Sequence[State | None],
    carries: Carries,
    traced: Sequence[Var],
    planner: Planner,
) -> list[State | None]:
    """The states in which the carries enter, from those before the loop.

    Args:
      states: before the loop.
      carries: what was found.
      traced: the variables that are carried.
      planner: of the loop.
    """
    return [
        _entering(s, want, is_sum, v, planner)
        for s, want, is_sum, v in zip(
            states, carries.wants, carries.sums, traced, strict=True
        )
    ]


def _entering(
    state: State | None, want: bool, is_sum: bool, traced: Var, planner: Planner
) -> State | None:
    """Half if wanted, else the float32 that the carry was traced in."""
    if state is None or castable_dtype(traced) is None:
        return None
    if traced_state(traced) is not NEUTRAL:
        return traced_state(traced)
    if is_sum:
        return KEPT
    if state.kind in _STAYS:
        return NEUTRAL
    return planner.low if want else NEUTRAL


def released(state: State | None, want: bool, planner: Planner) -> State | None:
    """The state outside a loop of what it keeps: its readers decide again."""
    if state is None or state.kind is not Kind.KEPT:
        return state
    return planner.low if want else NEUTRAL


def settle(
    states: list[State | None],
    plan_body: Callable[[list[State | None]], JaxprPlan],
) -> tuple[JaxprPlan, list[State | None]]:
    """Plans a body until the carries that it returns have the dtypes that it takes.

    A carry that the body keeps in float32 is carried in float32.

    Args:
      states: of the carries.
      plan_body: plans the body for such states.
    """
    while True:
        plan = plan_body(states)
        pinned = [
            before is not None
            and before.is_low
            and after is not None
            and after.kind in _STAYS
            for before, after in zip(states, plan.out_states, strict=False)
        ]
        if not any(pinned):
            return plan, states
        states = [
            NEUTRAL if pin else state for pin, state in zip(pinned, states, strict=True)
        ]
