"""Finds the state that a function takes, updates and returns, such as an average.

What a program keeps between two calls is a sum over all calls, though no loop shows it.
If a matmul reads it on the way it would be rounded, and the increments of the next call
be lost.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.primitives import ADDS, SCALES, SUMS_INTO
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.ops import _registry
from jaxmp.casting.plan.plan import Context
from jaxmp.casting.plan.states import KEPT, NEUTRAL, State, traced_state
from jaxmp.casting.planner._interface import Planner
from jaxmp.casting.sums import _sums, _updates

_UPDATES = ADDS | SUMS_INTO | SCALES


def returned_states(
    planner: Planner,
    jaxpr: Jaxpr,
    in_states: Sequence[State | None],
    wants: Sequence[bool],
) -> list[State | None]:
    """The states of a function's inputs: sums that it returns are kept in float32.

    Args:
      planner: of the function.
      jaxpr: of the function.
      in_states: the states that its inputs come in.
      wants: which of its outputs are wanted low.
    """
    jaxpr = open_jaxpr(jaxpr)
    found = list(in_states)
    origins = [
        Origins(1 << i if traced_state(v) is NEUTRAL and v.aval.shape else 0)
        for i, v in enumerate(jaxpr.invars)
    ]
    flow = _flow(planner, jaxpr, origins, wants, Context())
    for out, (_, rounded) in enumerate(flow):
        for index in _set_bits(rounded):
            is_known = found[index] is not NEUTRAL
            is_like = _updates.is_like(jaxpr.invars[index], jaxpr.outvars[out])
            if is_known or not is_like:
                continue
            if _sums.is_state(jaxpr, index, out):
                found[index] = KEPT
    return found


class Origins(NamedTuple):
    """Which inputs a value may be an update of, as bits.

    A train step has a thousand inputs and outputs: one pass has to find the few pairs
    that are worth a look.
    """

    inputs: int
    rounded: int = 0
    """Those from which it would have been rounded on the way."""


_NOTHING = Origins(0)


def _flow(
    planner: Planner,
    jaxpr: Jaxpr,
    entering: Sequence[Origins],
    wants: Sequence[bool],
    context: Context,
) -> list[Origins]:
    jaxpr = open_jaxpr(jaxpr)
    wanted = planner.wants(jaxpr, wants, context).values
    values = dict(zip(jaxpr.invars, entering, strict=True))

    def of(atom: Atom) -> Origins:
        return _NOTHING if is_literal(atom) else values.get(atom, _NOTHING)

    for eqn in jaxpr.eqns:
        operands = [of(v) for v in eqn.invars]
        if not any(known.inputs for known in operands):
            continue
        results = _made(planner, eqn, operands, wanted, context)
        for v, made in zip(eqn.outvars, results, strict=True):
            here = made.inputs if v in wanted else 0
            values[v] = Origins(made.inputs, made.rounded | here)
    return [of(v) for v in jaxpr.outvars]


def _made(
    planner: Planner,
    eqn: Eqn,
    operands: Sequence[Origins],
    wanted: frozenset[Any],
    context: Context,
) -> Sequence[Origins]:
    """The origins of an equation's results, its own rounding aside."""
    name, call = eqn.primitive.name, _registry.call_rule(eqn.primitive.name)
    if call is None:
        is_update = name in _UPDATES or _updates.may_hand_on(eqn)
        return [_union(operands) if is_update else _NOTHING] * len(eqn.outvars)
    if not call.is_loop and name != "cond":
        results = [v in wanted for v in eqn.outvars]
        inside = planner.inside(eqn, context)
        return _flow(planner, call.bodies(eqn)[-1], operands, results, inside)
    union = _union(operands)
    return [union._replace(rounded=union.inputs)] * len(eqn.outvars)


def _union(operands: Sequence[Origins]) -> Origins:
    inputs = rounded = 0
    for known in operands:
        inputs, rounded = inputs | known.inputs, rounded | known.rounded
    return Origins(inputs, rounded)


def _set_bits(bits: int) -> Iterator[int]:
    while bits:
        index = bits.bit_length() - 1
        yield index
        bits ^= 1 << index
