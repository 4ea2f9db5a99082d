"""Which values are sums of sums: what loops carry, and additions in a row."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxmp._jaxpr.atoms import is_half, is_literal, variables
from jaxmp._jaxpr.calls import body, loop
from jaxmp._jaxpr.primitives import ADDS, CAST, LAYOUT
from jaxmp._jaxpr.sums import SCATTER, rows_of_scatter
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._jaxpr.walk import makers

# What hands on its operand, moved about or in another dtype.
_MOVES = LAYOUT | {CAST, "optimization_barrier", "reduce_precision"}


class Carry(NamedTuple):
    """A half value that a loop carries, and to which it adds.

    Attributes:
      aval: its shape and dtype.
      added: the equation that adds.
      terms: how many terms are added in all iterations; None in a `while`.
      depends_on_itself: whether what is added is computed from the carry.
    """

    aval: Any
    added: Eqn
    terms: int | None
    depends_on_itself: bool


def carried_sums(eqn: Eqn) -> Iterator[Carry]:
    """The half carries of a `scan` or `while` that are sums.

    Each is followed from the end of the body back to its beginning.
    """
    read = loop(eqn)
    inside = open_jaxpr(read.body)
    for variable, out in zip(read.carried(), inside.outvars, strict=False):
        found = _additions_between(inside, variable, out) if is_half(variable) else None
        if found is not None and found[0]:
            per_iteration, added = found
            terms = None if read.length is None else read.length * per_iteration
            yield Carry(
                aval=variable.aval,
                added=added,
                terms=None if terms is None else math.ceil(terms),
                depends_on_itself=_depends(inside, added, variable),
            )


def _additions_between(
    jaxpr: Jaxpr, start: Var, end: Atom
) -> tuple[float, Eqn | None] | None:
    """How many terms are added on the way from one variable to another, and where.

    None if there is no way that consists of additions.
    """
    made_by = makers(jaxpr)

    def back(v: Atom) -> tuple[float, Eqn | None] | None:
        if v is start:
            return 0, None
        if is_literal(v) or v not in made_by:
            return None
        eqn = made_by[v]
        for operand, terms, added in _summands(eqn, eqn.outvars.index(v)):
            found = back(operand)
            if found is not None:
                return found[0] + terms, added if added is not None else found[1]
        return None

    return back(end)


def _summands(eqn: Eqn, index: int) -> Iterator[tuple[Atom, float, Eqn | None]]:
    """The operands that a result may be a sum of: operand, terms added, by what."""
    name = eqn.primitive.name
    if name in ADDS:
        for operand in eqn.invars[: 1 if name == "sub" else 2]:
            yield operand, 1, eqn
    elif name in _MOVES:
        yield eqn.invars[index if name == "optimization_barrier" else 0], 0, None
    elif name == "select_n":
        for operand in eqn.invars[1:]:
            yield operand, 0, None
    elif name == SCATTER:
        rows, places = rows_of_scatter(eqn)
        yield eqn.invars[0], rows / places, eqn
    elif name == "scan":
        read = loop(eqn)
        if index < read.carries:
            place = read.consts + index
            for operand, terms, added in _through(eqn, read.body, index, [place]):
                yield operand, terms * (read.length or 0), added
    elif (called := body(eqn)) is not None:
        yield from _through(eqn, called, index, range(len(eqn.invars)))


def _through(
    eqn: Eqn, jaxpr: Jaxpr, index: int, positions: Iterable[int]
) -> Iterator[tuple[Atom, float, Eqn | None]]:
    """The same through the body of a call, or what a loop inside carries."""
    inside = open_jaxpr(jaxpr)
    out = inside.outvars[index]
    for position in positions:
        variable = inside.invars[position]
        if variable.aval.shape == out.aval.shape:
            found = _additions_between(inside, variable, out)
            if found is not None:
                yield eqn.invars[position], *found


def _depends(jaxpr: Jaxpr, added: Eqn, start: Var) -> bool:
    """Whether what an equation adds is computed from a variable, besides the sum.

    Also true of an equation in a call, where nobody looks.
    """
    made = {start}
    for eqn in jaxpr.eqns:
        given = [v for v in variables(eqn.invars) if v in made]
        if eqn is added:
            return len(given) > 1
        if given:
            made.update(eqn.outvars)
    return True


def additions_in_a_row(jaxpr: Jaxpr) -> Iterator[tuple[Eqn, int]]:
    """The last of each row of half-precision additions, and how many terms it has."""
    depth: dict[Var, int] = {}
    ends: dict[Var, Eqn] = {}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        is_addition = name in ("add", "add_any")
        if not (is_addition or name in _MOVES) or not is_half(eqn.outvars[0]):
            continue
        inputs, out = list(variables(eqn.invars)), eqn.outvars[0]
        before = max((depth.get(v, 0) for v in inputs), default=0)
        if is_addition:
            for v in inputs:
                ends.pop(v, None)
            depth[out] = before + 1
            ends[out] = eqn
        elif before:
            for v in inputs:
                if v in ends:
                    ends[out] = ends.pop(v)
            depth[out] = before
    for v, eqn in ends.items():
        yield eqn, depth[v] + 1
