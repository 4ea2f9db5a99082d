"""The equations of a program, those in calls included."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxmp._jaxpr.atoms import variables
from jaxmp._jaxpr.calls import BODY, JITS, LOOPS, held, loop
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr


def walk(jaxpr: Jaxpr, into: Callable[[Any], Sequence[Any]] = held) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside it, in order.

    Args:
      jaxpr: with or without its constants.
      into: which jaxprs of an equation to enter: all that are `held`, or its `bodies`.
    """
    for eqn in open_jaxpr(jaxpr).eqns:
        yield eqn
        for inner in into(eqn):
            yield from walk(inner, into)


def counted(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    """As `walk`, with how often each is carried out; a `while` runs its body once."""
    for eqn in open_jaxpr(jaxpr).eqns:
        yield eqn, times
        length = loop(eqn).length if eqn.primitive.name in LOOPS else None
        inside = times if length is None else times * length
        for inner in held(eqn):
            yield from counted(inner, inside)


def makers(jaxpr: Jaxpr) -> dict[Any, Any]:
    """The equation that makes each variable of a jaxpr, its inputs left out."""
    return {v: eqn for eqn in open_jaxpr(jaxpr).eqns for v in eqn.outvars}


def first_equations(jaxpr: Jaxpr) -> dict[Any, Any]:
    """The first equation that was traced in each place of the source.

    JAX gives the operations of a derivative the traceback of the operation that they
    are the derivative of, which comes before them.
    """
    found: dict[Any, Any] = {}
    for eqn in walk(jaxpr):
        traceback = eqn.source_info.traceback
        if traceback is not None:
            found.setdefault(traceback, eqn)
    return found


def reader(jaxpr: Jaxpr, eqn: Eqn) -> Any:
    """The first equation that reads what another made, or None.

    What a call returns is read by what reads the result of the call.
    """
    made = set(eqn.outvars)
    for e in walk(jaxpr):
        if not made.isdisjoint(variables(e.invars)):
            return e
    for call in walk(jaxpr):
        for inner in held(call):
            outs = open_jaxpr(inner).outvars
            if len(outs) != len(call.outvars) or eqn not in open_jaxpr(inner).eqns:
                continue
            if not made.isdisjoint(variables(outs)):
                return reader(jaxpr, call)
    return None


def producer(jaxpr: Jaxpr, eqn: Eqn) -> Any:
    """The equation that made the first operand of another, or None."""
    return next((e for e in walk(jaxpr) if eqn.invars[0] in e.outvars), None)


def unwrapped(eqn: Eqn) -> Iterator[Eqn]:
    """The equation, or those of the jitted function that it calls."""
    if eqn.primitive.name not in JITS:
        yield eqn
        return
    for inner in open_jaxpr(eqn.params[BODY[eqn.primitive.name]]).eqns:
        yield from unwrapped(inner)
