"""`find_nonfinite`: the first operation that makes a NaN or an infinity that matters.

    the function alone    ->  something not finite comes out:  divergence
    then with gradients   ->  something not finite comes out:  is it finite at a lower
                              loss scale?  handled overflow : divergence

What comes out is followed back through the operands that are to blame (`_provenance`)
to the operations that made a NaN or an infinity out of finite numbers; the first of
them in the order of execution is the one.

An infinity that reaches no output is nobody's concern: `-inf` in a mask, `exp` that
overflows in 1 / (1 + exp(x)), `log(0)` behind a `where`. Nor is an infinite constant or
argument that comes out as it went in, unless as the loss or a gradient.

Sharp edges
- Operations are carried out one at a time, in the dtypes that they have; only loops are
  compiled, until they show something. XLA makes x of log(exp(x)): where it compiles the
  whole step, and in a loop here, an overflow inside of that is none.
- The function is run several times, its callbacks never or several times.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxmp._jaxpr.walk import first_equations, producer, reader
from jaxmp._views.numbers import power
from jaxmp.errors import JaxmpError
from jaxmp.numerics.nonfinite._cause_of_operation import is_mask
from jaxmp.numerics.nonfinite._causes import explain
from jaxmp.numerics.nonfinite._finite_scale import finite_scale
from jaxmp.numerics.nonfinite._origin import Origin, ancestors, is_narrow
from jaxmp.numerics.nonfinite._provenance import Tracked, Tracker
from jaxmp.numerics.nonfinite._remedy import (
    Remedy,
    remedy_of_operation,
    remedy_under_autocast,
)
from jaxmp.numerics.nonfinite._report import NonfiniteReport
from jaxmp.numerics.replay._float32_lines import Line
from jaxmp.numerics.replay._program import Program, read_program
from jaxmp.numerics.replay._site import ReplaySite


def find_nonfinite(
    fn: Callable[..., Any],
    *args: Any,
    policy: Any = None,
    rules: Sequence[Any] = (),
    loss_scale: Any = None,
    argnums: int | Sequence[int] = 0,
    backward: bool | None = None,
    **kwargs: Any,
) -> NonfiniteReport:
    """Finds the first operation that makes a NaN or Inf which reaches the result.

    The function is run operation by operation, and then once more with its gradient,
    through loops, branches, `jax.checkpoint` and custom rules. To look into a saved bad
    batch, call it on its parameters and batch with its loss scale.

    Args:
      fn: function that can be jitted, such as a loss function or a training step. nnx
        modules may be arguments.
      *args: what it is called with.
      policy: run it under `autocast(fn, policy, rules=rules)`; None runs it as it is.
      rules: of `autocast`.
      loss_scale: a number, an optimizer state or a `LossScale`; None is 1.
      argnums: arguments to differentiate with respect to.
      backward: whether to look at the gradient; None does so if `fn` returns a floating
        scalar, alone or first in a tuple.
      **kwargs: passed on to `fn`.

    Returns:
      A `NonfiniteReport`, which is False if everything that comes out is finite. `str`
      tells it in plain words.

    Raises:
      NonScalarLoss: if `backward` is True and `fn` returns no loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import find_nonfinite
      >>> def loss(w, x):
      ...     return jnp.mean(jnp.exp(w * x))
      >>> found = find_nonfinite(loss, jnp.float32(50.0), jnp.array([1.0, 2.0]))
      >>> found.kind, found.primitive, found.is_backward
      ('divergence', 'exp', False)
      >>> print(found.cause)
      exp of 100 overflows float32, whose largest is 3.403e+38
    """
    read = functools.partial(
        read_program,
        fn,
        args,
        kwargs,
        policy=policy,
        argnums=argnums,
        backward=backward,
        loss_scale=loss_scale,
    )
    program = read(rules=rules)
    found = _look(program)
    if found is None:
        return NonfiniteReport(loss_scale=program.loss_scale)
    remedy = _remedy(found, policy, functools.partial(_retry, read, rules, found))
    return dataclasses.replace(
        found.report,
        repair=f"{found.report.repair} {remedy.advice}".rstrip(),
        float32_helps=remedy.works,
    )


class _Found(NamedTuple):
    """What is not finite: the report on it, its origin, and where it stands."""

    report: NonfiniteReport
    origin: Origin
    site: ReplaySite | None


def _look(program: Program, lower_scale: bool = True) -> _Found | None:
    """Runs a program, and then its gradient, and tells what is not finite.

    With `lower_scale`, an overflow of scaled gradients is told from one that no scale
    mends.
    """
    tracker = Tracker()
    found = _alarm(program, tracker.track(program, value_only=True))
    if found is None and program.loss_scale is not None:
        outs = tracker.track(program, value_only=False)
        found = _alarm(program, outs, in_gradient=True)
        if found is not None and lower_scale:
            found = found._replace(report=_at_lower_scale(found.report, program))
    return found


def _remedy(found: _Found, policy: Any, retry: Callable[..., Any]) -> Remedy:
    """What float32 mends, tried before it is advised."""
    if found.site is None or not is_narrow(found.origin) or is_mask(found.origin):
        return Remedy()
    scale = found.report.finite_at_scale
    if scale is not None and scale >= 1:
        # A lower loss scale mends it, and dynamic loss scaling finds that.
        return Remedy()
    if policy is None:
        return remedy_of_operation(found.origin, found.site)
    return remedy_under_autocast(_line(found), found.site, retry)


def _retry(
    read: Callable[..., Program],
    rules: Sequence[Any],
    found: _Found,
    more: Sequence[Any],
    lines: frozenset[Line],
) -> Line | bool:
    """The line that is not finite with more in float32; True if there is none."""
    is_handled = found.report.kind == "handled overflow"
    try:
        program = read(rules=[*more, *rules], in_float32=lines)
    except JaxmpError:
        # A rule of the user's that now matches nothing.
        return False
    again = _look(program, lower_scale=not is_handled)
    if again is None or again.report.kind == "handled overflow":
        return True
    return _line(again) or False


def _line(found: _Found) -> Line | None:
    report = found.report
    if report.file is None or report.line is None:
        return None
    return Line(report.file, report.line)


def _at_lower_scale(found: NonfiniteReport, program: Program) -> NonfiniteReport:
    """Tells an overflow of scaled gradients from one that no scale mends."""
    scale = finite_scale(program)
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


def _alarm(
    program: Program, outs: Sequence[Tracked], in_gradient: bool = False
) -> _Found | None:
    """What is not finite among the first outputs, or None."""
    reached = [
        (output, x.origin)
        for output, x in zip(program.outputs, outs, strict=False)
        if x.origin is not None and _matters(output.kind, x.origin)
    ]
    if not reached:
        return None
    origin = _first(ancestors(origin for _, origin in reached))
    site = _place(program, origin)
    report = _report(program, origin, site, in_gradient)
    names = tuple(str(output) for output, _ in reached)
    return _Found(dataclasses.replace(report, reached=names), origin, site)


def _place(program: Program, origin: Origin) -> ReplaySite | None:
    """Where an operation stands: a cast that autocast makes, where it is read."""
    site = origin.site
    if site is None or not (site.library or "").startswith("jaxmp.casting"):
        return site
    eqn = reader(program.jaxpr, site.eqn)
    if eqn is None:
        return site
    return ReplaySite(eqn, site.parent, site.needed, site.is_later)


def _matters(kind: str, origin: Origin) -> bool:
    """Whether an output may not be as it is: any NaN, and any Inf that was made."""
    if kind in ("loss", "gradient") or origin.what == "NaN":
        return True
    return any(source.kind in ("made", "undefined") for source in ancestors([origin]))


def _first(origins: Sequence[Origin]) -> Origin:
    """The origin to report, among all in the order of execution."""

    def is_source(origin):
        is_given = origin.kind in ("input", "constant")
        return origin.kind == "made" or (is_given and origin.what == "NaN")

    ranked = (
        is_source,
        lambda origin: origin.kind == "undefined",
        lambda origin: origin.kind in ("input", "constant"),
        lambda origin: True,
    )
    return next(o for matches in ranked for o in origins if matches(o))


def _report(
    program: Program, origin: Origin, place: ReplaySite | None, in_gradient: bool
) -> NonfiniteReport:
    site = origin.site
    line = place.line if place else None
    if origin.kind == "input":
        cause = f"the argument {origin.name} already holds {origin.what}"
        repair = (
            "Look at the step that made it: an update that should have been skipped "
            "(jaxmp.loss_scaling does), or a batch with a missing value."
        )
    elif origin.kind == "constant":
        cause = f"a constant of the program is {origin.what}"
        repair = (
            "A number beyond the range of a dtype is infinite in it, as -1e9 is in "
            "float16: use jnp.finfo(x.dtype).min."
        )
    elif origin.kind == "passed":
        cause = f"{site.primitive} gives {origin.what} out of what it was given"
        repair = "Look into it with find_nonfinite on the function inside."
    else:
        first = first_equations(program.jaxpr)
        written = first.get(site.eqn.source_info.traceback, site.eqn)
        cause, repair = explain(
            origin,
            derivative_of=_derivative_of(site, written),
            is_hidden=in_gradient and not site.is_later,
            given=producer(program.jaxpr, site.eqn),
        )
        if place is not None and place is not site:
            cause += f". autocast makes this cast for {place.primitive}, which reads it"
    if place is not None and not in_gradient:
        cause += _inside_derivatives(place, program)
    primitive = origin.kind
    if primitive not in ("input", "constant"):
        primitive = site.primitive
    return NonfiniteReport(
        kind="divergence",
        what=origin.what,
        primitive=primitive,
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
        loss_scale=program.loss_scale,
    )


def _inside_derivatives(site: ReplaySite, program: Program) -> str:
    """Says that a value which is not finite is inside of a derivative."""
    order = site.derivatives - (program.loss_scale is not None)
    if order < 1:
        return ""
    what = "a derivative" if order == 1 else f"a derivative of order {order}"
    return (
        f". It is inside of {what} that the function takes itself, in the forward "
        "pass: the loss scale comes after it and cannot mend it, however low"
    )


def _derivative_of(site: Any, written: Any) -> str | None:
    """The primitive whose derivative an operation is part of, or None.

    `written` is the first operation with its traceback. Another one in the same place
    is of the derivative, unless a Python loop has written the same again.
    """
    name = written.primitive.name
    if written is site.eqn or (name == site.primitive and not site.is_later):
        return None
    return name
