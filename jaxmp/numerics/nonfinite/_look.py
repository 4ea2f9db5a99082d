"""`look`: runs a program, and reports what comes out that is not finite."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxmp._jaxpr.walk import reader
from jaxmp._views.numbers import power
from jaxmp.numerics.nonfinite._explain import explain
from jaxmp.numerics.nonfinite._origin import Origin, ancestors
from jaxmp.numerics.nonfinite._report import NonfiniteReport
from jaxmp.numerics.nonfinite._tracker import Tracked, Tracker
from jaxmp.numerics.ranges._finiteness import nonfinite
from jaxmp.numerics.replay._float32_lines import Line
from jaxmp.numerics.replay._interpreter import CompiledLoops
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._site import ReplaySite

_LOWEST_EXPONENT = -24


class Found(NamedTuple):
    """What is not finite: the report on it, its origin, and where it stands."""

    report: NonfiniteReport
    origin: Origin
    site: ReplaySite | None

    @property
    def line(self) -> Line | None:
        """The line that is reported."""
        file, number = self.report.file, self.report.line
        return None if file is None or number is None else Line(file, number)


def look(program: Program, lower_scale: bool = True) -> Found | None:
    """Runs a program, and then its gradient, until something is not finite.

    With `lower_scale`, it also tries whether a lower loss scale mends gradients.
    """
    tracker = Tracker()
    found = _alarm(program, tracker.track(program, value_only=True))
    if found is None and program.loss_scale is not None:
        outs = tracker.track(program, value_only=False)
        found = _alarm(program, outs, in_gradient=True)
        if found is not None and lower_scale:
            found = found._replace(report=_at_lower_scale(found.report, program))
    return found


def _at_lower_scale(found: NonfiniteReport, program: Program) -> NonfiniteReport:
    """Reports a handled overflow if a lower loss scale mends the gradients."""
    scale = _finite_scale(program)
    if scale is None:
        return found
    return dataclasses.replace(
        found,
        kind="handled overflow",
        finite_at_scale=scale,
        cause=f"{found.cause}, under the loss scale {power(program.loss_scale)}",
        repair="Nothing, if it is rare: jaxmp.loss_scaling skips the step and lowers "
        f"the scale. If the scale gets too low for small gradients: {found.repair}",
    )


def _finite_scale(program: Program) -> float | None:
    """The largest power of two below the loss scale at which gradients are finite."""
    run = CompiledLoops()

    def is_finite(exponent: int) -> bool:
        outs = run.run_program(program.at_scale(2.0**exponent))
        return not any(nonfinite(list(program.gradients(outs).values())))

    assert program.loss_scale is not None
    high = math.ceil(math.log2(program.loss_scale))
    low = min(_LOWEST_EXPONENT, high - 1)
    if not is_finite(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_finite(middle) else (low, middle)
    return 2.0**low


def _alarm(
    program: Program, outs: Sequence[Tracked], in_gradient: bool = False
) -> Found | None:
    """What is not finite among the first outputs, or None."""
    reached = [
        (output, x.origin)
        for output, x in zip(program.outputs, outs, strict=False)
        if x.origin is not None and _matters(output.kind, x.origin)
    ]
    if not reached:
        return None
    origin = _first(ancestors(origin for _, origin in reached))
    place = _place(program, origin)
    names = tuple(str(output) for output, _ in reached)
    return Found(_report(program, origin, place, names, in_gradient), origin, place)


def _matters(kind: str, origin: Origin) -> bool:
    """Whether an output may not be as it is: any NaN, and any Inf that was made."""
    if kind in ("loss", "gradient") or origin.what == "NaN":
        return True
    return any(source.kind in ("made", "undefined") for source in ancestors([origin]))


def _first(origins: Sequence[Origin]) -> Origin:
    """The origin to report, among all in the order of execution."""

    def rank(origin: Origin) -> int:
        is_given = origin.kind in ("input", "constant")
        if origin.kind == "made" or (is_given and origin.what == "NaN"):
            return 0
        return 1 if origin.kind == "undefined" else 2 if is_given else 3

    return min(origins, key=rank)


def _place(program: Program, origin: Origin) -> ReplaySite | None:
    """Where an operation stands: a cast that autocast makes, where it is read."""
    site = origin.site
    if site is None or not (site.library or "").startswith("jaxmp.casting"):
        return site
    eqn = reader(program.jaxpr, site.eqn)
    if eqn is None:
        return site
    return ReplaySite(eqn, site.parent, site.needed, site.is_later)


def _report(
    program: Program,
    origin: Origin,
    place: ReplaySite | None,
    reached: tuple[str, ...],
    in_gradient: bool,
) -> NonfiniteReport:
    site, line = origin.site, place.line if place else None
    cause, repair = explain(program, origin, place, in_gradient)
    is_given = origin.kind in ("input", "constant")
    return NonfiniteReport(
        kind="divergence",
        what=origin.what,
        primitive=origin.kind if is_given else origin.primitive,
        path=place.path if place else "",
        file=None if line is None else line.file,
        line=None if line is None else line.line,
        function=None if line is None else line.function,
        is_backward=in_gradient or bool(site and site.is_backward),
        in_gradient=in_gradient,
        iterations=origin.iterations,
        operands=origin.operands,
        result=origin.result,
        cause=cause,
        repair=repair,
        reached=reached,
        loss_scale=program.loss_scale,
    )
