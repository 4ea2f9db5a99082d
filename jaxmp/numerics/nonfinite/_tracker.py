"""`Tracker`: runs a program, and knows where each NaN and infinity came from.

Every value carries an `Origin` if an element of it is not finite, and None otherwise.
An origin knows the operation, and the origins of the operands that are to blame. An
operand is to blame if ones in place of its NaNs and infinities make the result more
finite. Behind `where(x > 0, log(x), 0)` nothing is left to blame.

Loops run compiled first. Only if something that is not finite goes in or comes out do
they run iteration by iteration, and only the iterations that it concerns run operation
by operation. Compiled loops keep every rounding to half precision.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.calls import LOOPS
from jaxmp._jaxpr.execution import as_function, bind, jit_exactly
from jaxmp._jaxpr.matmuls import QUANTIZE
from jaxmp._jaxpr.primitives import SCALED_DOT
from jaxmp._jaxpr.types import Array, Arrays, Jaxpr
from jaxmp.numerics.nonfinite._origin import (
    Operand,
    Origin,
    Stacked,
    describe,
    index_in,
    row_origin,
)
from jaxmp.numerics.ranges._finiteness import What, nonfinite
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._shards import Record
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.quantization.scales import Quantized


class Tracked(NamedTuple):
    """A value and why it is not finite."""

    value: Array
    origin: Origin | None = None


class Tracker(Interpreter):
    """Runs programs on `Tracked` values."""

    def __init__(self):
        super().__init__()
        self._count = 0
        self._compiled: dict[int, Callable[..., list[Array]]] = {}
        self._seen: set[ReplaySite] = set()

    def track(self, program: Program, *, value_only: bool) -> list[Tracked]:
        """Runs a program on its inputs; see `run_program`."""
        named = zip(program.inputs, program.input_names, strict=True)
        inputs = [
            Tracked(x, Origin("input", what, name=name) if what else None)
            for (x, name), what in zip(named, nonfinite(program.inputs), strict=True)
        ]
        return self.run_program(program, inputs, value_only=value_only)

    def equation(self, site: ReplaySite, operands: Sequence[Tracked]) -> list[Tracked]:
        self._count += 1
        values = [x.value for x in operands]
        results = bind(site.eqn, values)
        found = nonfinite(results)
        if not any(found):
            return [Tracked(x) for x in results]
        parents, is_made = _to_blame(site, operands, results)
        return [
            Tracked(x, what and self._origin(site, values, x, what, parents, is_made))
            for x, what in zip(results, found, strict=True)
        ]

    def _origin(
        self,
        site: ReplaySite,
        values: Arrays,
        result: Array,
        what: What,
        parents: Sequence[Origin],
        is_made: bool,
    ) -> Origin:
        kind = "passed"
        if is_made:
            kind = "made"
        elif site.primitive == QUANTIZE:
            pass  # small formats have no infinity: it is NaN there
        elif what == "NaN" and all(parent.what == "Inf" for parent in parents):
            kind = "undefined"
        origin = Origin(kind, what, tuple(parents), self._count, site, self.iterations)
        if kind == "passed":
            return origin
        at = _first_nonfinite(result)
        made = dataclasses.replace(
            origin,
            operands=_described(site, values, at),
            result=describe(result, at),
        )
        # Only the first time, for the iterations of a loop would keep too much.
        if site in self._seen or not made.is_narrow:
            return made
        self._seen.add(site)
        return dataclasses.replace(made, values=tuple(values))

    def constant(self, value: jax.Array, site: ReplaySite | None) -> Tracked:
        (what,) = nonfinite([value])
        if what is None:
            return Tracked(value)
        return Tracked(value, Origin("constant", what, order=self._count, site=site))

    def concrete(self, value: Tracked) -> Array:
        return value.value

    def take(self, values: Sequence[Tracked], index: int) -> list[Tracked]:
        slices = super().take([x.value for x in values], index)
        if all(x.origin is None for x in values):
            return list(map(Tracked, slices))
        found = nonfinite(slices)
        return [
            Tracked(x, row_origin(whole.origin, index) if what else None)
            for x, what, whole in zip(slices, found, values, strict=True)
        ]

    def stack(
        self, site: ReplaySite, rows: Sequence[Sequence[Tracked]]
    ) -> list[Tracked]:
        columns = super().stack(site, [[x.value for x in row] for row in rows])
        origins = ([x.origin for x in column] for column in zip(*rows, strict=True))
        return list(map(Tracked, columns, map(Stacked.of, origins)))

    def loop(self, site: ReplaySite, operands: Sequence[Tracked]) -> list[Tracked]:
        outs = self._finite_results(id(site.eqn), _whole(site), operands)
        return super().loop(site, operands) if outs is None else outs

    def call(
        self, site: ReplaySite, jaxpr: Jaxpr, operands: Sequence[Tracked]
    ) -> list[Tracked]:
        if site.primitive in LOOPS:
            outs = self._finite_results(id(jaxpr), as_function(jaxpr), operands)
            if outs is not None:
                return outs
        return super().call(site, jaxpr, operands)

    def shards(self, site: ReplaySite, operands: Sequence[Tracked]) -> list[Tracked]:
        outs = self._finite_results(id(site.eqn), _whole(site), operands)
        if outs is not None:
            return outs
        outs, records = self.look_into_shards(site, [x.value for x in operands])
        parents = [x.origin for x in operands if x.origin is not None]
        for inside in records:
            parents += self._made_in_shards(inside)
        return [
            Tracked(x, what and Origin("passed", what, tuple(parents), site=site))
            for x, what in zip(outs, nonfinite(outs), strict=True)
        ]

    def _made_in_shards(self, inside: Record) -> list[Origin]:
        """The origins of what an operation in a `shard_map` made, if it did."""
        self._count += 1
        given = nonfinite(inside.operands)
        is_made = not any(given)
        return [
            self._origin(inside.site, inside.operands, x, what, [], is_made)
            for x, what in zip(inside.results, nonfinite(inside.results), strict=True)
            if what and (is_made or (what == "NaN" and "NaN" not in given))
        ]

    def _finite_results(
        self, key: int, run: Callable[..., list[Array]], operands: Sequence[Tracked]
    ) -> list[Tracked] | None:
        """The results of a compiled run, or None unless all in and out is finite."""
        if any(x.origin is not None for x in operands):
            return None
        if key not in self._compiled:
            self._compiled[key] = jit_exactly(run)
        outs = self._compiled[key](*(x.value for x in operands))
        return None if any(nonfinite(outs)) else list(map(Tracked, outs))


def _described(
    site: ReplaySite, values: Arrays, at: tuple[int, ...]
) -> tuple[Operand, ...]:
    """The ranges of operands; those of a quantised matmul with their scales."""
    if site.primitive != SCALED_DOT:
        return tuple(describe(x, index_in(x.shape, at)) for x in values)
    pairs = (Quantized(*values[i : i + 2]) for i in (0, 2))
    return tuple(
        describe(x.in_dtype(jnp.float32))._replace(dtype=str(x.values.dtype))
        for x in pairs
    )


def _whole(site: ReplaySite) -> Callable[..., list[Array]]:
    """An equation as a function of its operands."""
    return lambda *values: bind(site.eqn, values)


def _to_blame(
    site: ReplaySite, operands: Sequence[Tracked], results: Arrays
) -> tuple[list[Origin], bool]:
    """The origins to blame for results, and whether finite numbers are as well."""
    suspects = {i: x.origin for i, x in enumerate(operands) if x.origin is not None}
    if not suspects:
        return [], True
    if site.eqn.effects:
        return list(suspects.values()), False
    values = [x.value for x in operands]
    cleared = {i: _with_ones(values[i]) for i in suspects}

    def count(kept: int | None) -> int:
        """How much is not finite with all suspects but one cleared."""
        given = [x if i == kept else cleared.get(i, x) for i, x in enumerate(values)]
        return _count_nonfinite(bind(site.eqn, given))

    without = count(None)
    if len(suspects) == 1:
        is_to_blame = not without or _count_nonfinite(results) > without
        return list(suspects.values()) if is_to_blame else [], without > 0
    blamed = [origin for i, origin in suspects.items() if count(i) > without]
    # Infinities that only matter together: inf - inf, inf / inf.
    if not blamed and not without:
        blamed = list(suspects.values())
    return blamed, without > 0


def _count_nonfinite(values: Arrays) -> int:
    floats = [x for x in values if jnp.issubdtype(x.dtype, jnp.inexact)]
    return int(_sum_nonfinite(floats))


@jax.jit
def _sum_nonfinite(values: list[jax.Array]) -> Array:
    return sum(jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in values)


@jax.jit
def _with_ones(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.ones_like(x))


def _first_nonfinite(x: Array) -> tuple[int, ...]:
    mask = np.asarray(~jnp.isfinite(x))
    return tuple(map(int, np.unravel_index(int(np.argmax(mask)), mask.shape)))
