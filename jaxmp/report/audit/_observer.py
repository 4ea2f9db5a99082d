"""Looks at every equation of a program, and notes what the audit tells."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxmp._jaxpr.atoms import is_half
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp.report.audit._sums import Sums
from jaxmp.report.audit._values import WIDE, Origin, Promotion, Value, best, is_wide
from jaxmp.report.audit._walk import Context
from jaxmp.report.audit._widenings import Group, Widenings, is_promotion
from jaxmp.report.audit.records import Collective, Matmul

_COLLECTIVES = frozenset(
    (
        "psum",
        "psum_invariant",
        "unreduced_psum",
        "pmax",
        "pmin",
        "all_gather",
        "all_gather_invariant",
        "all_gather_reduced",
        "reduce_scatter",
        "unreduced_reduce_scatter",
        "ppermute",
        "all_to_all",
        "ragged_all_to_all",
    )
)
# What hands its first operand on, moved about.
_STRUCTURAL = frozenset(
    (
        "broadcast_in_dim",
        "copy",
        "gpu_barrier",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "name",
        "pvary",
        "reduce_precision",
        "reshape",
        "rev",
        "sharding_constraint",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    )
)


class Observer:
    """What a `Walker` calls.

    Attributes:
      widenings: the promotions that were found.
      matmuls: one for each, however often it runs.
      collectives: likewise.
      sums: those that are too long for their dtype.
    """

    def __init__(self):
        self.widenings = Widenings()
        self.matmuls: list[tuple[Matmul, frozenset[Any]]] = []
        self.collectives: list[Collective] = []
        self.sums = Sums()
        # A backward equation has the line of the forward one that it comes from.
        self._narrowings: set[Any] = set()
        self._forward: dict[Any, frozenset[Any]] = {}

    def look(
        self, eqn: Any, values: Sequence[Value], context: Context
    ) -> Sequence[Value]:
        """Notes an equation that is no call, and says what is known of its results."""
        if context.is_settled:
            self.sums.look(eqn, values, context)
        results = self.results(eqn, values, context)
        if not _is_data(eqn, values):
            return results
        return [result._replace(is_data=True) for result in results]

    def results(
        self, eqn: Any, values: Sequence[Value], context: Context
    ) -> Sequence[Value]:
        """Follows where the dtypes of the results come from."""
        name = eqn.primitive.name
        is_gradient = context.in_backward or any(v.is_gradient for v in values)
        self.widenings.used({key for v in values for key in v.groups}, context.site)
        if name == "convert_element_type":
            return [self.cast(eqn, values[0], context, is_gradient)]
        if name == "optimization_barrier":
            return values
        if name in _STRUCTURAL:
            return [values[0]._replace(is_gradient=is_gradient, is_data=False)]
        groups = self.meeting(eqn, values, context, is_gradient)
        if name in MATMULS:
            groups = self.matmul(eqn, groups, context)
        if name in _COLLECTIVES:
            self.collective(eqn, context)
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

    def cast(
        self, eqn: Any, value: Value, context: Context, is_gradient: bool
    ) -> Value:
        """Tells promotion, a cast on purpose, and a cast back from each other."""
        (operand,), (result,) = eqn.invars, eqn.outvars
        target, line = result.aval.dtype, _line(context)
        if target not in WIDE:
            self._narrowings.add(line)
            is_constant = value.origin is not None and value.origin.kind == "constant"
            origin = value.origin if is_constant else None
            return Value(origin, is_gradient=is_gradient, size=value.size)
        if not is_half(operand):
            if value.origin is not None and value.origin.kind == "constant":
                shown = f"{target}{list(result.aval.shape)}"
                value = value._replace(origin=value.origin._replace(name=shown))
            return value._replace(is_gradient=is_gradient)
        is_transposed = context.in_backward and line in self._narrowings
        if context.in_autocast or is_transposed or not is_promotion(context.site):
            origin = Origin("cast", site=context.site)
            return Value(origin, is_gradient=is_gradient, size=value.size)
        promotion = _promotion(operand, target, context)
        origin = Origin("computed", site=context.site)
        return Value(origin, frozenset(), is_gradient, promotion, value.size)

    def meeting(
        self, eqn: Any, values: Sequence[Value], context: Context, is_gradient: bool
    ) -> frozenset[Any]:
        """Finds what promoted the operands; gives the widenings behind the result."""
        reasons = [
            value
            for atom, value in zip(eqn.invars, values, strict=True)
            if is_wide(atom) and value.promotion is None
        ]
        promotions = [v.promotion for v in values if v.promotion is not None]
        is_matmul = eqn.primitive.name in MATMULS
        is_transposed = context.in_backward and _line(context) in self._forward
        if is_matmul and reasons and not is_transposed:
            # A matmul takes a half and a wide operand as they are.
            half = [v for v in eqn.invars[:2] if is_half(v)]
            promotions += [_promotion(v, np.float32, context) for v in half]
        if not reasons and len({p.half for p in promotions}) > 1:
            reasons = [Value(Origin("mixed"))]
        for promotion in promotions:
            if reasons and not promotion.is_explained:
                reason = best(reasons)
                self.widenings.add(promotion, reason, context, is_gradient)
        groups = frozenset[Any]().union(
            *(v.groups for v in values), *(p.groups for p in promotions)
        )
        self.name_arguments(groups, reasons, context)
        return groups

    def name_arguments(
        self, groups: Iterable[Any], reasons: Sequence[Value], context: Context
    ) -> None:
        """A layer that was widened is known by the parameter that it multiplies by."""
        for key in groups:
            group = self.widenings.groups[key]
            if group.argument or group.library is None:
                continue
            if group.path == "/".join(context.path):
                named = (r.origin.argument for r in reasons if r.origin is not None)
                group.argument = next(filter(None, named), "")

    def matmul(
        self, eqn: Any, groups: frozenset[Any], context: Context
    ) -> frozenset[Any]:
        """Notes a matmul, and gives the widenings without which it would be half."""
        line = _line(context)
        forward = self._forward.get(line, frozenset())
        if context.in_backward:
            groups |= forward
        else:
            self._forward[line] = forward | groups
        if not context.is_settled:
            return groups
        times = context.times * context.devices
        shape = matmul_shape(eqn)
        lhs, rhs = (str(v.aval.dtype) for v in eqn.invars[:2])
        matmul = Matmul(
            eqn.primitive.name,
            (lhs, rhs),
            str(eqn.outvars[0].aval.dtype),
            shape,
            times,
            times * shape.flops,
            context.site.source,
            "/".join(context.path),
            context.in_backward,
            bool(groups),
            context.under,
            context.site.library or "",
        )
        if matmul.is_wide:
            for key in groups:
                group = self.widenings.groups[key]
                group.matmuls += times
                group.flops += matmul.flops
        self.matmuls.append((matmul, groups if matmul.is_wide else frozenset()))
        return groups

    def collective(self, eqn: Any, context: Context) -> None:
        """Notes what is sent."""
        if not context.is_settled:
            return
        for v in eqn.invars:
            if hasattr(v.aval, "dtype"):
                size = context.times * v.aval.size * v.aval.dtype.itemsize
                self.collectives.append(
                    Collective(
                        eqn.primitive.name,
                        str(v.aval.dtype),
                        v.aval.shape,
                        size,
                        context.times,
                        context.site.source,
                        "/".join(context.path),
                    )
                )

    def outputs(self, atoms: Sequence[Any], values: Sequence[Value]) -> None:
        """Notes which widenings reach the outputs of the program."""
        for atom, value in zip(atoms, values, strict=True):
            for key in value.groups:
                group: Group = self.widenings.groups[key]
                group.reaches_scalar |= atom.aval.size == 1
                group.reaches_output |= atom.aval.size > 1 and not value.is_gradient


# How an index is made of what is given: negative ones count from the end.
_INDEXING = frozenset(
    (
        "add",
        "clamp",
        "concatenate",
        "convert_element_type",
        "lt",
        "max",
        "min",
        "rem",
        "select_n",
        "sub",
    )
)


def _is_data(eqn: Any, values: Sequence[Value]) -> bool:
    """Whether integers are those of an argument, moved about or made an index."""
    dtype = getattr(eqn.outvars[0].aval, "dtype", None)
    if getattr(dtype, "kind", "") not in ("i", "u", "b"):
        return False
    name = eqn.primitive.name
    if name in _STRUCTURAL:
        return values[0].is_data
    return name in _INDEXING and all(value.is_data for value in values)


def _line(context: Context) -> Any:
    """The user's line, and the function of JAX that it calls."""
    return context.site.source, context.site.written.inside_jax[-1:]


def _promotion(operand: Any, wide: Any, context: Context) -> Promotion:
    aval = operand.aval
    return Promotion(context.site, aval.shape, aval.dtype, np.dtype(wide))


def _result_origin(eqn: Any, values: Sequence[Value], context: Context) -> Origin:
    origins = [v.origin for v in values if v.origin is not None]
    if len(origins) == len(values):
        kinds = {origin.kind for origin in origins}
        if kinds <= {"scalar", "constant"}:
            return Origin("constant", _shown(eqn.outvars), context.site)
    wide = [
        v.origin
        for atom, v in zip(eqn.invars, values, strict=True)
        if v.origin is not None and is_wide(atom)
    ]
    argument = next((o.argument for o in wide if o.argument), "")
    return Origin("computed", eqn.primitive.name, context.site, argument)


def _shown(variables: Sequence[Any]) -> str:
    avals = (v.aval for v in variables[:1] if hasattr(v.aval, "dtype"))
    return "".join(f"{aval.dtype}{list(aval.shape)}" for aval in avals)
