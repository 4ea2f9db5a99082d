"""Which share of a plan's matmul FLOPs is in half, and what keeps the rest from it."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.calls import loop
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Eqn, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.ops import _registry
from jaxmp.casting.plan.plan import EqnPlan, JaxprPlan
from jaxmp.casting.plan.states import Kind, State


class Reason(NamedTuple):
    """Why matmuls are not in half.

    Attributes:
      reason: what was decided, and why.
      source: the user's line that decided it, "" if unknown: that of the cause, such as
        a cast, and not of the matmul that reads what was cast.
      flops: what these matmuls cost.
      matmuls: how many equations they are.
    """

    reason: str
    source: str
    flops: float
    matmuls: int


class Shares(NamedTuple):
    """What the matmuls and convolutions of a plan cost.

    Attributes:
      half: FLOPs of those whose floating operands are half.
      total: FLOPs of all that have a floating or complex operand.
      reasons: for those that are not in half, the costliest first.
    """

    half: float
    total: float
    reasons: tuple[Reason, ...]

    @property
    def share(self) -> float:
        """The share in half, between 0 and 1; 1 if there is no matmul."""
        return self.half / self.total if self.total else 1.0


def own_flops(plan: EqnPlan, times: int = 1) -> tuple[float, float]:
    """The matmul FLOPs in half and not in half of one equation, `times` over.

    Those of a call count if it is bound whole; else its equations have them.
    """
    site = Site(plan.eqn)
    if plan.eqn.primitive.name in MATMULS:
        found = list(_matmul(plan, site, None, times))
    else:
        found = [] if plan.call else list(_as_traced(plan, site, plan.eqn, times))
    half = sum(matmul.flops for matmul in found if matmul.cause is None)
    return half, sum(matmul.flops for matmul in found) - half


class _Cause(NamedTuple):
    """What was decided, and where the equation stands that decided."""

    reason: str
    site: Site


class _Matmul(NamedTuple):
    eqn: Eqn
    flops: float
    cause: _Cause | None
    """None if it is in half."""


def shares_of(plan: JaxprPlan) -> Shares:
    """Counts the matmul FLOPs of a plan.

    Args:
      plan: the plan of a jaxpr. Calls are entered, and the bodies of scans count as
        often as they run; those of `while` loops count once, and so does each branch of
        a conditional.

    Returns:
      The FLOPs in half and in all, and the reasons for what is not in half.
    """
    half = total = 0.0
    flops: dict[tuple[str, str], float] = collections.defaultdict(float)
    matmuls: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    for found in _walk(plan, (None,) * len(plan.jaxpr.invars), 1, {}, None):
        total += found.flops
        if found.cause is None:
            half += found.flops
            continue
        key = found.cause.reason, str(found.cause.site.source or "")
        flops[key] += found.flops
        matmuls[key].add(id(found.eqn))
    reasons = [Reason(*key, flops[key], len(matmuls[key])) for key in flops]
    reasons.sort(key=lambda reason: -reason.flops)
    return Shares(half, total, tuple(reasons))


def _walk(
    plan: JaxprPlan,
    entering: Sequence[_Cause | None],
    times: int,
    causes: dict[Var, _Cause | None],
    parent: Site | None,
) -> Iterator[_Matmul]:
    """The matmuls of a plan; fills in what pinned each of its values, if anything."""
    causes.update(zip(plan.jaxpr.invars, entering, strict=True))
    for eqn in plan.eqns:
        site = Site(eqn.eqn, parent)
        operands = [None if is_literal(v) else causes.get(v) for v in eqn.eqn.invars]
        results = [_pinning(eqn, site, s, operands) for s in eqn.out_states]
        if eqn.eqn.primitive.name in MATMULS:
            yield from _matmul(eqn, site, next(filter(None, operands), None), times)
        elif eqn.call is None:
            yield from _as_traced(eqn, site, eqn.eqn, times)
        else:
            count = times * eqn.eqn.params.get("length", 1)
            for body, inputs in _entered(eqn, operands):
                inside: dict[Var, _Cause | None] = {}
                yield from _walk(body, inputs, count, inside, site)
                outs = body.jaxpr.outvars
                if len(outs) == len(results):
                    found = [None if is_literal(v) else inside.get(v) for v in outs]
                    results = [r and (f or r) for r, f in zip(results, found)]  # noqa: B905
        causes.update(zip(eqn.eqn.outvars, results, strict=True))


def _pinning(
    eqn: EqnPlan, site: Site, state: State | None, operands: Sequence[_Cause | None]
) -> _Cause | None:
    if state is None or state.kind is not Kind.PINNED:
        return None
    return next(filter(None, operands), _Cause(eqn.reason, site))


def _entered(
    eqn: EqnPlan, operands: Sequence[_Cause | None]
) -> Iterator[tuple[JaxprPlan, Sequence[_Cause | None]]]:
    """The bodies of a call, with the causes of their inputs."""
    call = getattr(eqn.call, "primal", eqn.call)
    name = eqn.eqn.primitive.name
    if name == "cond":
        yield from ((branch, operands[1:]) for branch in call)
    elif name == "while":
        of_condition, consts, carries, _ = loop(eqn.eqn).split(operands)
        condition, body = call
        yield condition, (*of_condition, *carries)
        yield body, (*consts, *carries)
    else:
        yield call, operands


def _matmul(
    plan: EqnPlan, site: Site, cause: _Cause | None, times: int
) -> Iterator[_Matmul]:
    """A matmul, and its cause, or its own reason, if it is not in half."""
    if not _counts(plan.eqn):
        return
    dtypes = [
        dtype or v.aval.dtype
        for v, dtype in zip(plan.eqn.invars[:2], plan.in_dtypes, strict=False)
        if castable_dtype(v)
    ]
    is_half = bool(dtypes) and all(dtype in _tree.HALF for dtype in dtypes)
    cause = None if is_half else cause or _Cause(plan.reason, site)
    yield _Matmul(plan.eqn, times * matmul_shape(plan.eqn).flops, cause)


def _as_traced(plan: EqnPlan, site: Site, eqn: Eqn, times: int) -> Iterator[_Matmul]:
    """The matmuls inside a call that is bound whole."""
    call = _registry.call_rule(eqn.primitive.name)
    for body in () if call is None else call.bodies(eqn):
        for inner in open_jaxpr(body).eqns:
            count = times * eqn.params.get("length", 1)
            if inner.primitive.name in MATMULS and _counts(inner):
                dtypes = [v.aval.dtype for v in inner.invars[:2]]
                is_half = all(dtype in _tree.HALF for dtype in dtypes)
                cause = None if is_half else _Cause(plan.reason, site)
                yield _Matmul(inner, count * matmul_shape(inner).flops, cause)
            else:
                yield from _as_traced(plan, site, inner, count)


def _counts(eqn: Eqn) -> bool:
    """Whether a matmul has an operand that is not an integer."""
    kinds = {v.aval.dtype.kind for v in eqn.invars[:2]}
    return bool(kinds & set("fcV"))
