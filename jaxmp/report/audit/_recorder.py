"""Looks at every equation of a program, and notes what the audit reports."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxmp._jaxpr.atoms import is_half, is_integer
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.matmuls import operands
from jaxmp._jaxpr.primitives import ALL_MATMULS, CAST, COLLECTIVES, LAYOUT, MATMULS
from jaxmp._jaxpr.types import Atom, Eqn
from jaxmp.report.audit._accumulations import Accumulations
from jaxmp.report.audit._dataflow import Context
from jaxmp.report.audit._origins import (
    WIDE,
    Origin,
    Promotion,
    Value,
    array_name,
    is_wide,
    likeliest,
)
from jaxmp.report.audit._widenings import Widenings, is_silent_cast
from jaxmp.report.audit.records import Collective, Matmul

# What hands on its first operand, moved about.
_MOVES = LAYOUT | {"device_put", "dynamic_slice", "gather", "reduce_precision"}
# How an index is made of integers that are given: negative ones count from the end.
_INDEXING = frozenset(
    [CAST, "add", "clamp", "concatenate", "lt", "max", "min", "rem", "select_n", "sub"]
)


class Recorder:
    """What a `Dataflow` looks with.

    Attributes:
      widenings: the promotions that were found.
      matmuls: one for each, however often it runs, with the keys of the widenings
        without which it would be half.
      collectives: one for each operand.
      accumulations: the sums that are too long for their dtype.
    """

    def __init__(self):
        self.widenings = Widenings()
        self.matmuls: list[tuple[Matmul, frozenset[Any]]] = []
        self.collectives: list[Collective] = []
        self.accumulations = Accumulations()
        # A backward equation has the line of the forward one that it comes from.
        self._narrowings: set[Any] = set()
        self._forward: dict[Any, frozenset[Any]] = {}

    def look(
        self, eqn: Eqn, values: Sequence[Value], context: Context
    ) -> Sequence[Value]:
        """Notes an equation that is not a call; returns what its results are."""
        if context.is_settled:
            self.accumulations.look(eqn, values, context)
        results = self._results(eqn, values, context)
        if not _is_data(eqn, values):
            return results
        return [result._replace(is_data=True) for result in results]

    def outputs(self, atoms: Sequence[Atom], values: Sequence[Value]) -> None:
        """Notes which widenings reach the outputs of the program."""
        for atom, value in zip(atoms, values, strict=True):
            for key in value.groups:
                group = self.widenings.groups[key]
                group.reaches_scalar |= atom.aval.size == 1
                group.reaches_output |= atom.aval.size > 1 and not value.is_gradient

    def _results(
        self, eqn: Eqn, values: Sequence[Value], context: Context
    ) -> Sequence[Value]:
        """Follows where the dtypes of the results come from."""
        name = eqn.primitive.name
        is_gradient = context.site.is_backward or any(v.is_gradient for v in values)
        self.widenings.used({key for v in values for key in v.groups}, context.site)
        if name == CAST:
            return [self._cast(eqn, values[0], context, is_gradient)]
        if name == "optimization_barrier":
            return values
        if name in _MOVES:
            return [values[0]._replace(is_gradient=is_gradient, is_data=False)]
        groups = self._meeting(eqn, values, context, is_gradient)
        if name in ALL_MATMULS:
            groups = self._matmul(eqn, groups, context)
        if name in COLLECTIVES and context.is_settled:
            self.collectives += _collectives(eqn, context)
        origin = _result_origin(eqn, values, context)
        return [
            Value(
                origin,
                groups if getattr(v.aval, "dtype", None) in WIDE else frozenset(),
                is_gradient,
                size=getattr(v.aval, "size", 1),
            )
            for v in eqn.outvars
        ]

    def _cast(
        self, eqn: Eqn, value: Value, context: Context, is_gradient: bool
    ) -> Value:
        """Tells apart promotion, a cast on purpose, and a cast back."""
        (operand,), (result,) = eqn.invars, eqn.outvars
        target, line = result.aval.dtype, _line(context)
        is_constant = value.blame.kind == "constant"
        if target not in WIDE:
            self._narrowings.add(line)
            origin = value.origin if is_constant else None
            return Value(origin, is_gradient=is_gradient, size=value.size)
        if not is_half(operand):
            if is_constant:
                shown = value.blame._replace(name=array_name(result.aval))
                value = value._replace(origin=shown)
            return value._replace(is_gradient=is_gradient)
        is_transposed = context.site.is_backward and line in self._narrowings
        if context.in_autocast or is_transposed or not is_silent_cast(context.site):
            origin = Origin("cast", site=context.site)
            return Value(origin, is_gradient=is_gradient, size=value.size)
        promotion = _promotion(operand, target, context)
        origin = Origin("computed", site=context.site)
        return Value(origin, frozenset(), is_gradient, promotion, value.size)

    def _meeting(
        self, eqn: Eqn, values: Sequence[Value], context: Context, is_gradient: bool
    ) -> frozenset[Any]:
        """Finds what promoted the operands; returns the widenings behind the result."""
        reasons = [
            value
            for atom, value in zip(eqn.invars, values, strict=True)
            if is_wide(atom) and value.promotion is None
        ]
        promotions = [v.promotion for v in values if v.promotion is not None]
        is_matmul = eqn.primitive.name in MATMULS
        is_transposed = context.site.is_backward and _line(context) in self._forward
        if is_matmul and reasons and not is_transposed:
            # A matmul takes a half and a wide operand as they are.
            half = [v for v in eqn.invars[:2] if is_half(v)]
            promotions += [_promotion(v, np.float32, context) for v in half]
        if not reasons and len({p.half for p in promotions}) > 1:
            reasons = [Value(Origin("mixed"))]
        for promotion in promotions:
            if reasons and not promotion.is_explained:
                reason = likeliest(reasons)
                self.widenings.add(promotion, reason, context, is_gradient)
        groups = frozenset[Any]().union(
            *(v.groups for v in values), *(p.groups for p in promotions)
        )
        self._name_arguments(groups, reasons, context)
        return groups

    def _name_arguments(
        self, groups: Iterable[Any], reasons: Sequence[Value], context: Context
    ) -> None:
        """A layer that was widened is known by the parameter that it multiplies by."""
        for key in groups:
            group = self.widenings.groups[key]
            if group.argument or group.library is None:
                continue
            if group.path == context.site.path:
                named = (reason.blame.argument for reason in reasons)
                group.argument = next(filter(None, named), "")

    def _matmul(
        self, eqn: Eqn, groups: frozenset[Any], context: Context
    ) -> frozenset[Any]:
        """Notes a matmul; returns the widenings without which it would be half."""
        line, site = _line(context), context.site
        forward = self._forward.get(line, frozenset())
        if site.is_backward:
            groups |= forward
        else:
            self._forward[line] = forward | groups
        if not context.is_settled:
            return groups
        shape = matmul_shape(eqn)
        lhs, rhs = (str(aval.dtype) for aval in operands(eqn))
        matmul = Matmul(
            operation=eqn.primitive.name,
            operands=(lhs, rhs),
            output=str(eqn.outvars[0].aval.dtype),
            shape=shape,
            times=context.runs,
            flops=context.runs * shape.flops,
            source=site.source,
            path=site.path,
            is_backward=site.is_backward,
            is_widened=bool(groups),
            under=context.under,
            library=site.library or "",
        )
        if matmul.is_wide:
            self.widenings.slowed(groups, matmul)
        self.matmuls.append((matmul, groups if matmul.is_wide else frozenset()))
        return groups


def _collectives(eqn: Eqn, context: Context) -> list[Collective]:
    avals = [v.aval for v in eqn.invars if hasattr(v.aval, "dtype")]
    return [
        Collective(
            operation=eqn.primitive.name,
            dtype=str(aval.dtype),
            shape=aval.shape,
            bytes=context.times * aval.size * aval.dtype.itemsize,
            times=context.times,
            source=context.site.source,
            path=context.site.path,
        )
        for aval in avals
    ]


def _is_data(eqn: Eqn, values: Sequence[Value]) -> bool:
    """Whether integers come from the arguments, moved about or turned into an index."""
    if not all(map(is_integer, eqn.outvars[:1])):
        return False
    name = eqn.primitive.name
    if name in _MOVES:
        return values[0].is_data
    return name in _INDEXING and all(value.is_data for value in values)


def _line(context: Context) -> Any:
    """The user's line, and the function of JAX that it calls."""
    return context.site.source, context.site.written.inside_jax[-1:]


def _promotion(operand: Atom, wide: Any, context: Context) -> Promotion:
    aval = operand.aval
    return Promotion(context.site, aval.shape, aval.dtype, np.dtype(wide))


def _result_origin(eqn: Eqn, values: Sequence[Value], context: Context) -> Origin:
    origins = [v.origin for v in values if v.origin is not None]
    are_constants = all(origin.kind in ("scalar", "constant") for origin in origins)
    if len(origins) == len(values) and are_constants:
        avals = (v.aval for v in eqn.outvars[:1] if hasattr(v.aval, "dtype"))
        return Origin("constant", "".join(map(array_name, avals)), context.site)
    operands = zip(eqn.invars, values, strict=True)
    wide = (value.blame.argument for atom, value in operands if is_wide(atom))
    argument = next(filter(None, wide), "")
    return Origin("computed", eqn.primitive.name, context.site, argument)
