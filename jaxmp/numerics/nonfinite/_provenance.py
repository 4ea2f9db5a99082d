"""Where each NaN and infinity came from, while a program runs.

Every value carries an `Origin` if an element of it is not finite, and None if all are.
An origin knows the operation and the origins of those operands that are to blame: an
operand is if the result is less finite with it than with 1 in place of its NaNs and
infinities. Behind `where(x > 0, log(x), 0)` nothing is left to blame.

Loops are first run compiled. Only if something that is not finite goes in or comes out
are they run iteration by iteration, and only the iterations that it concerns operation
by operation. The compiled loops keep every rounding to half precision.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.calls import LOOPS
from jaxmp._jaxpr.execution import as_function, bind, jit_exactly
from jaxmp.numerics.nonfinite._origin import (
    Origin,
    Stacked,
    describe,
    index_in,
    is_narrow,
    nonfinite,
    row_origin,
)
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program


class Tracked(NamedTuple):
    """A value and why it is not finite."""

    value: Any
    origin: Origin | None = None


class Tracker(Interpreter):
    """Runs programs on `Tracked` values."""

    def __init__(self):
        super().__init__()
        self._count = 0
        self._compiled: dict[int, Any] = {}
        self._seen: set[Any] = set()

    def track(self, program: Program, *, value_only: bool) -> list[Tracked]:
        """Runs a program on its inputs; see `run_program`."""
        inputs = [
            Tracked(x, Origin("input", what, name=name) if what else None)
            for x, what, name in zip(
                program.inputs,
                nonfinite(program.inputs),
                program.input_names,
                strict=True,
            )
        ]
        return self.run_program(program, inputs, value_only=value_only)

    def equation(self, site, operands):
        self._count += 1
        values = [x.value for x in operands]
        results = bind(site.eqn, values)
        found = nonfinite(results)
        if not any(found):
            return [Tracked(x) for x in results]
        blamed = _to_blame(site, operands, results)
        return [
            Tracked(x, self._origin(site, values, x, what, *blamed) if what else None)
            for x, what in zip(results, found, strict=True)
        ]

    def _origin(self, site, values, result, what, parents, is_made) -> Origin:
        kind = "passed"
        if is_made:
            kind = "made"
        elif what == "NaN" and all(parent.what == "Inf" for parent in parents):
            kind = "undefined"
        origin = Origin(kind, what, tuple(parents), self._count, site, self.iterations)
        if kind == "passed":
            return origin
        at = _first_nonfinite(result)
        made = dataclasses.replace(
            origin,
            operands=tuple(describe(x, index_in(x.shape, at)) for x in values),
            result=describe(result, at),
        )
        # Only the first time, for the iterations of a loop would keep too much.
        if site in self._seen or not is_narrow(made):
            return made
        self._seen.add(site)
        return dataclasses.replace(made, values=tuple(values))

    def constant(self, value, site):
        (what,) = nonfinite([value])
        if what is None:
            return Tracked(value)
        return Tracked(value, Origin("constant", what, order=self._count, site=site))

    def concrete(self, value):
        return value.value

    def take(self, values, index):
        slices = super().take([x.value for x in values], index)
        if all(x.origin is None for x in values):
            return list(map(Tracked, slices))
        found = nonfinite(slices)
        return [
            Tracked(x, row_origin(whole.origin, index) if what else None)
            for x, what, whole in zip(slices, found, values, strict=True)
        ]

    def stack(self, site, rows):
        columns = super().stack(site, [[x.value for x in row] for row in rows])
        stacked = []
        for x, column in zip(columns, zip(*rows, strict=True), strict=True):
            origins = [item.origin for item in column]
            stacked.append(Tracked(x, Stacked.of(origins)))
        return stacked

    def loop(self, site, operands):
        def whole(*values):
            return bind(site.eqn, values)

        outs = self._finite_results(id(site.eqn), whole, operands)
        return super().loop(site, operands) if outs is None else outs

    def call(self, site, jaxpr, operands):
        if site.primitive in LOOPS:
            run = as_function(jaxpr)
            outs = self._finite_results(id(jaxpr), run, operands)
            if outs is not None:
                return outs
        return super().call(site, jaxpr, operands)

    def shards(self, site, operands):
        def whole(*values):
            return bind(site.eqn, values)

        outs = self._finite_results(id(site.eqn), whole, operands)
        if outs is not None:
            return outs
        outs, records = self.look_into_shards(site, [x.value for x in operands])
        parents = [x.origin for x in operands if x.origin is not None]
        for inside in records:
            self._count += 1
            given = nonfinite(inside.operands)
            parents += [
                self._origin(inside.site, inside.operands, x, what, [], not any(given))
                for x, what in zip(
                    inside.results, nonfinite(inside.results), strict=True
                )
                if what and (not any(given) or (what == "NaN" and "NaN" not in given))
            ]
        return [
            Tracked(
                x, Origin("passed", what, tuple(parents), site=site) if what else None
            )
            for x, what in zip(outs, nonfinite(outs), strict=True)
        ]

    def _finite_results(self, key, run, operands) -> list[Tracked] | None:
        """The results of a compiled run, or None unless all in and out is finite."""
        if any(x.origin is not None for x in operands):
            return None
        if key not in self._compiled:
            self._compiled[key] = jit_exactly(run)
        outs = self._compiled[key](*(x.value for x in operands))
        return None if any(nonfinite(outs)) else list(map(Tracked, outs))


@jax.jit
def _count_nonfinite(values: list[Any]) -> Any:
    return sum(jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in values)


@jax.jit
def _with_ones(x: Any) -> Any:
    return jnp.where(jnp.isfinite(x), x, jnp.ones_like(x))


def _to_blame(site, operands, results) -> tuple[list[Origin], bool]:
    """The origins to blame for results, and whether finite numbers are as well."""
    suspects = [i for i, x in enumerate(operands) if x.origin is not None]
    if not suspects:
        return [], True
    values = [x.value for x in operands]
    if site.eqn.effects:
        return [operands[i].origin for i in suspects], False

    def count(values):
        floats = [x for x in values if jnp.issubdtype(x.dtype, jnp.inexact)]
        return int(_count_nonfinite(floats))

    cleared = {i: _with_ones(values[i]) for i in suspects}
    all_cleared = [cleared.get(i, x) for i, x in enumerate(values)]
    without = count(bind(site.eqn, all_cleared))
    if len(suspects) == 1:
        is_to_blame = not without or count(results) > without
        return [operands[i].origin for i in suspects if is_to_blame], without > 0
    blamed = []
    for suspect in suspects:
        others = {i: x for i, x in cleared.items() if i != suspect}
        alone = [others.get(i, x) for i, x in enumerate(values)]
        if count(bind(site.eqn, alone)) > without:
            blamed.append(operands[suspect].origin)
    # Infinities that only matter together: inf - inf, inf / inf.
    if not blamed and not without:
        blamed = [operands[i].origin for i in suspects]
    return blamed, without > 0


def _first_nonfinite(x: Any) -> tuple[int, ...]:
    mask = np.asarray(~jnp.isfinite(x))
    return tuple(map(int, np.unravel_index(int(np.argmax(mask)), mask.shape)))
