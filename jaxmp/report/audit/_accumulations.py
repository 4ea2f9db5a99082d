"""Sums whose accumulator is float16 or bfloat16, and that have too many terms for it.

A sum of equal positive numbers stops growing at 2^p of them in a format of p bits:
from there on, sum + term rounds to the sum. That is 256 in bfloat16 and 2048 in
float16. Longer sums are reported; matmuls are not, for GPUs and TPUs accumulate them
in float32.

    one after the other   a loop's carry, `scatter-add`, additions in a row
    in one operation      `reduce_sum`, `cumsum`, windowed sums: a compiler may keep
                          more bits than the program asks for
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmp._jaxpr.atoms import is_half
from jaxmp._jaxpr.calls import LOOPS
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.sums import (
    REDUCTIONS,
    SCATTER,
    rows_of_scatter,
    terms_of_reduction,
)
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.report.audit._dataflow import Context
from jaxmp.report.audit._origins import Value, array_name
from jaxmp.report.audit._running_sums import additions_in_a_row, carried_sums
from jaxmp.report.audit.records import Accumulation


def largest_safe(dtype: DTypeLike) -> int:
    """Up to how many equal positive terms a floating dtype adds up without loss."""
    return 2 ** (jnp.finfo(dtype).nmant + 1)


class Accumulations:
    """Collects the long sums of a program while a `Dataflow` walks it."""

    def __init__(self):
        self._found: dict[Any, Accumulation] = {}

    def found(self) -> tuple[Accumulation, ...]:
        """The long sums, the longest first.

        The backward pass of a `cumsum` is another one on the same line: it is left out.
        """
        found = self._found.values()
        forward = {(x.source, x.operation) for x in found if not x.is_backward}
        shown = [
            x
            for x in found
            if not x.is_backward or (x.source, x.operation) not in forward
        ]
        return tuple(sorted(shown, key=_gravity))

    def look(self, eqn: Eqn, values: Sequence[Value], context: Context) -> None:
        """Notes a reduction or a `scatter-add`."""
        name = eqn.primitive.name
        if name not in (*REDUCTIONS, SCATTER) or not is_half(eqn.outvars[0]):
            return
        if name == SCATTER:
            terms = _rows_to_one_place(eqn, values)
        elif (context.site.library or "jaxmp").partition(".")[0] != "jaxmp":
            # Such as the gradient of a bias in a layer of Flax's: no user wrote it.
            return
        else:
            terms = terms_of_reduction(eqn)
        self._add(name, eqn.outvars[0].aval, terms, context)

    def enter(self, jaxpr: Jaxpr, context: Context) -> None:
        """Notes what the loops of a jaxpr carry, and its additions in a row."""
        if not context.is_settled:
            return
        opened = open_jaxpr(jaxpr)
        for eqn in opened.eqns:
            if eqn.primitive.name in LOOPS:
                self._carried(eqn, context.at(eqn))
        for eqn, terms in additions_in_a_row(opened):
            self._add("add", eqn.outvars[0].aval, terms, context.at(eqn))

    def _carried(self, eqn: Eqn, context: Context) -> None:
        for carry in carried_sums(eqn):
            if carry.terms is not None or not carry.depends_on_itself:
                inside = context._replace(site=Site(carry.added, context.site))
                self._add(eqn.primitive.name, carry.aval, carry.terms, inside)

    def _add(self, name: str, aval: Any, terms: int | None, context: Context) -> None:
        safe, site = largest_safe(aval.dtype), context.site
        if terms is not None and terms <= safe:
            return
        key = site.source, name, array_name(aval), terms, site.is_backward
        times = self._found[key].times if key in self._found else 0
        self._found[key] = Accumulation(
            operation=name,
            dtype=str(aval.dtype),
            shape=aval.shape,
            terms=terms,
            largest_safe=safe,
            times=times + context.runs,
            source=site.source,
            path=site.path,
            is_backward=site.is_backward,
            under=context.under,
        )


def _gravity(found: Accumulation) -> tuple[bool, float]:
    terms = math.inf if found.terms is None else found.terms
    return not found.is_sequential, -terms / found.largest_safe


def _rows_to_one_place(eqn: Eqn, values: Sequence[Value]) -> int:
    """How many rows a `scatter-add` may add to one place.

    Indices that come from outside, as tokens do, may all be equal. Those that are
    computed, as a permutation is, are equal only if there are too few places.
    """
    if eqn.params["unique_indices"]:
        return 1
    rows, places = rows_of_scatter(eqn)
    return rows if values[1].is_data else -(-rows // places)
