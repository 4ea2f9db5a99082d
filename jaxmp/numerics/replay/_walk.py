"""What the equations of a program say without being run."""

from collections.abc import Iterator
from typing import Any

from jaxmp._jaxpr.versions import open_jaxpr


def walk(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside of it, in order."""
    for eqn in open_jaxpr(jaxpr).eqns:
        yield eqn
        for inner in _inside(eqn):
            yield from walk(inner)


def _inside(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple) else (value,):
            if hasattr(inner, "eqns"):
                yield inner


def first_equations(jaxpr: Any) -> dict[Any, Any]:
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


def reader(jaxpr: Any, eqn: Any) -> Any:
    """The first equation that reads what another made, or None.

    What a call returns is read by what reads the result of the call.
    """
    made = set(eqn.outvars)
    for e in walk(jaxpr):
        if any(not hasattr(v, "val") and v in made for v in e.invars):
            return e
    for call in walk(jaxpr):
        for inner in _inside(call):
            outs = open_jaxpr(inner).outvars
            if len(outs) != len(call.outvars) or eqn not in open_jaxpr(inner).eqns:
                continue
            if any(not hasattr(v, "val") and v in made for v in outs):
                return reader(jaxpr, call)
    return None


def producer(jaxpr: Any, eqn: Any) -> Any:
    """The equation that made the first operand of another, or None."""
    return next((e for e in walk(jaxpr) if eqn.invars[0] in e.outvars), None)
