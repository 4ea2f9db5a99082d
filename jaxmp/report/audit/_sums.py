"""Sums whose accumulator is float16 or bfloat16, and that have too many terms for it.

A sum of equal positive numbers stops growing at 2^p of them in a format of p bits:
from there on, sum + term rounds to sum. That is 256 in bfloat16 and 2048 in float16; a
sum of more terms is told. Matmuls are not: GPUs and TPUs accumulate them in float32.

    one after the other   a carry of a loop, `scatter-add`, additions in a row
    in one operation      `reduce_sum`, `cumsum`, windowed sums: a compiler may keep
                          more bits than the program asks for, or none
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr import sources as _sources
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.report.audit._chains import Chains, additions_in_a_row, scattered
from jaxmp.report.audit._values import Value
from jaxmp.report.audit._walk import Context

_REDUCTIONS = (
    "reduce_sum", "cumsum", "reduce_window_sum", "reduce_window", "scatter-add"
)  # fmt: skip


class Accumulation(NamedTuple):
    """A sum whose accumulator has too few bits for its number of terms.

    Attributes:
      operation: the primitive: `"scan"` and `"while"` for what a loop carries, `"add"`
        for additions in a row.
      dtype: of the accumulator.
      shape: of the accumulator.
      terms: how many terms an element has; None in a `while`, whose iterations are not
        known.
      largest_safe: how many equal positive terms the dtype can add up: 2^p for p bits.
      times: how often the sum is made.
      source: the user's line.
      path: name scopes and modules around it.
      is_backward: whether it is part of a backward pass.
      under: `"autocast"`, `"full_precision"` or `"apply_policy"` if it is inside of
        one.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    terms: int | None
    largest_safe: int
    times: int
    source: _sources.Source | None
    path: str
    is_backward: bool
    under: str

    @property
    def is_sequential(self) -> bool:
        """Whether the terms are added one after the other, whatever compiles it."""
        return self.operation in ("scan", "while", "add", "scatter-add")

    def __str__(self) -> str:
        what = _WRITTEN.get(self.operation, f"{self.operation} of")
        terms = "an unknown number of" if self.terms is None else f"{self.terms}"
        many = "up to " if self.operation == "scatter-add" else ""
        return (
            f"accumulates in half: {what} {many}{terms} terms in {self.dtype}"
            f"{list(self.shape)}, which holds {self.largest_safe} equal ones"
        )


_WRITTEN = {
    "scan": "a loop that carries the sum of",
    "while": "a loop that carries the sum of",
    "add": "additions in a row, of",
}


def largest_safe(dtype: Any) -> int:
    """Up to how many equal positive terms a floating dtype adds up without loss."""
    return 2 ** (jnp.finfo(dtype).nmant + 1)


class Sums:
    """Collects the accumulations of a program while a `Walker` walks it."""

    def __init__(self):
        self._found: dict[Any, Accumulation] = {}

    def found(self) -> tuple[Accumulation, ...]:
        """Those that were found, the longest first.

        The backward pass of a `cumsum` is one too, on the same line, and is left out.
        """
        forward = {(x.source, x.operation) for x in self._all if not x.is_backward}
        told = [
            x
            for x in self._all
            if not x.is_backward or (x.source, x.operation) not in forward
        ]
        return tuple(sorted(told, key=_gravity))

    @property
    def _all(self) -> Collection[Accumulation]:
        return self._found.values()

    def look(self, eqn: Any, values: Sequence[Value], context: Context) -> None:
        """Notes a reduction."""
        name, aval = eqn.primitive.name, eqn.outvars[0].aval
        if name not in _REDUCTIONS or getattr(aval, "dtype", None) not in _tree.HALF:
            return
        if name == "scatter-add":
            terms = _added_rows(eqn, values)
        elif (context.site.library or "jaxmp").partition(".")[0] != "jaxmp":
            # The gradient of a bias in a layer of Flax's: nothing that a user wrote.
            return
        else:
            terms = _reduced(eqn)
        if terms > largest_safe(aval.dtype):
            self._add(name, aval, terms, context)

    def body(self, jaxpr: Any, context: Context) -> None:
        """Notes what the loops of a body carry, and its additions in a row."""
        if not context.is_settled:
            return
        opened = open_jaxpr(jaxpr)
        for eqn in opened.eqns:
            if eqn.primitive.name in ("scan", "while"):
                self._carried(eqn, context)
        for eqn, terms in additions_in_a_row(opened):
            aval = eqn.outvars[0].aval
            if terms > largest_safe(aval.dtype):
                self._add("add", aval, terms, context.at(eqn))

    def _carried(self, loop: Any, context: Context) -> None:
        inside = context.at(loop)
        for carry in Chains(loop).carried():
            aval = carry.aval
            if aval.dtype not in _tree.HALF:
                continue
            safe = largest_safe(aval.dtype)
            if carry.terms is None:
                is_long = not carry.depends_on_itself
            else:
                is_long = carry.terms > safe
            if is_long:
                site = Site(carry.added.source_info.traceback, inside.site)
                at = inside._replace(site=site)
                self._add(loop.primitive.name, aval, carry.terms, at)

    def _add(self, name: str, aval: Any, terms: int | None, context: Context) -> None:
        source = context.site.source
        key = source, name, aval.dtype, aval.shape, terms, context.in_backward
        times = self._found[key].times if key in self._found else 0
        self._found[key] = Accumulation(
            name,
            str(aval.dtype),
            aval.shape,
            terms,
            largest_safe(aval.dtype),
            times + context.times * context.devices,
            source,
            "/".join(context.path),
            context.in_backward,
            context.under,
        )


def _gravity(found: Accumulation) -> tuple[bool, float]:
    terms = math.inf if found.terms is None else found.terms
    return not found.is_sequential, -terms / found.largest_safe


def _reduced(eqn: Any) -> int:
    """How many numbers a reduction adds up to one."""
    shape, params = eqn.invars[0].aval.shape, eqn.params
    if eqn.primitive.name == "cumsum":
        return shape[params["axis"]]
    if eqn.primitive.name == "reduce_sum":
        return math.prod(shape[axis] for axis in params["axes"])
    if "jaxpr" in params and not _is_addition(params["jaxpr"]):
        return 0
    return math.prod(params["window_dimensions"])


def _is_addition(jaxpr: Any) -> bool:
    return [e.primitive.name for e in open_jaxpr(jaxpr).eqns] == ["add"]


def _added_rows(eqn: Any, values: Sequence[Value]) -> int:
    """How many rows may be added to one.

    Where the places come from outside, as tokens do, they may all be the same; where
    they are computed, as in a permutation, they are if there are too few of them.
    """
    if eqn.params["unique_indices"]:
        return 1
    rows, places = scattered(eqn)
    return rows if values[1].is_data else -(-rows // places)
