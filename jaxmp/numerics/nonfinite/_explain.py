"""`explain`: why a NaN or an infinity is there, in plain words, and its repair.

The files of causes know the operations on finite numbers. This one adds what holds for
all: infinities that were there before, derivatives, and the trap of `where`, whose
other branch the gradient meets.
"""

from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.types import Eqn
from jaxmp._jaxpr.walk import first_equations, producer
from jaxmp.numerics.nonfinite import _elementwise_causes, _sum_causes
from jaxmp.numerics.nonfinite._cause import Cause, at
from jaxmp.numerics.nonfinite._origin import Origin, ancestors
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._site import ReplaySite

_CAUSES = {**_elementwise_causes.CAUSES, **_sum_causes.CAUSES}


def explain(
    program: Program, origin: Origin, place: ReplaySite | None, in_gradient: bool
) -> Cause:
    """Why a value is not finite, and what to do about it.

    Args:
      program: that was run.
      origin: of the value.
      place: where the user's code reads it.
      in_gradient: whether only gradients show it.
    """
    if origin.kind == "input":
        return Cause(
            f"the argument {origin.name} already holds {origin.what}",
            "Look at the step that made it: an update that should have been skipped "
            "(jaxmp.loss_scaling does), or a batch with a missing value.",
        )
    if origin.kind == "constant":
        cause = f"a constant of the program is {origin.what}"
        repair = (
            "A number beyond the range of a dtype is infinite in it, as -1e9 is in "
            "float16: use jnp.finfo(x.dtype).min."
        )
    elif origin.kind == "passed":
        cause = f"{origin.primitive} gives {origin.what} out of what it was given"
        repair = "Look into it with find_nonfinite on the function inside."
    else:
        cause, repair = _of_operation(program, origin, in_gradient)
        if place is not None and place is not origin.site:
            cause += f". autocast makes this cast for {place.primitive}, which reads it"
    if place is not None and not in_gradient:
        cause += _inside_derivatives(place, program)
    return Cause(cause, repair)


def _inside_derivatives(site: ReplaySite, program: Program) -> str:
    """Says that a value which is not finite is part of a derivative."""
    order = site.derivatives - (program.loss_scale is not None)
    if order < 1:
        return ""
    what = "a derivative" if order == 1 else f"a derivative of order {order}"
    return (
        f". It is inside {what} that the function takes itself, in the forward pass: "
        "the loss scale comes after it and cannot mend it, however low"
    )


def _of_operation(program: Program, made: Origin, in_gradient: bool) -> Cause:
    """Why an operation made it, out of finite numbers or of infinities."""
    site = made.site
    assert site is not None
    first = first_equations(program.jaxpr).get(site.eqn.source_info.traceback, site.eqn)
    derivative_of = _derivative_of(site, first)
    given = producer(program.jaxpr, site.eqn)
    if made.kind == "undefined":
        cause, repair = _undefined(made)
    elif derivative_of in _DERIVATIVES and not _is_overflow(made):
        cause, repair = _derivative(made, derivative_of)
    elif made.primitive == CAST and given is not None:
        cause, repair = _sum_causes.cast_of(made, given)
    else:
        cause, repair = _CAUSES.get(made.primitive, _other)(made)
    if in_gradient and not site.is_later and derivative_of is None:
        cause += (
            ". What the function returns does not show it, because a `where`, a `clip` "
            "or a product with zero leaves it out; its gradient is multiplied by 0, "
            "and 0 * inf is NaN"
        )
        repair = (
            "Keep the dangerous value out of the operation as well: "
            "safe = jnp.where(ok, x, 1.0); y = jnp.where(ok, f(safe), 0.0). " + repair
        )
    return Cause(cause, repair)


def _derivative_of(site: ReplaySite, first: Eqn) -> str | None:
    """The primitive whose derivative an operation is part of, or None.

    `first` is the first operation with its traceback. Another one in the same place
    is of the derivative, unless a Python loop has written the same again.
    """
    name = first.primitive.name
    if first is site.eqn or (name == site.primitive and not site.is_later):
        return None
    return name


def _is_overflow(made: Origin) -> bool:
    """Whether the operands at the element are ordinary numbers, none of them zero."""
    return all(x.at is not None and x.at != 0 for x in made.operands)


def _undefined(made: Origin) -> Cause:
    """A NaN out of infinities that nobody made: constants, or arguments."""
    name = made.primitive
    sources = {origin.kind for origin in ancestors(made.parents)}
    where = (
        "an infinity that the function was given"
        if "input" in sources
        else "an infinite constant (or one that is infinite in this dtype, as -1e9 is "
        "in float16)"
    )
    if name in ("sub", "add", "add_any", "reduce_sum"):
        return Cause(
            f"inf - inf, out of {where}: a softmax row that is masked throughout, or a "
            "mask that is added twice",
            "Mask with jnp.finfo(scores.dtype).min instead of -inf, and once; or give "
            "jax.nn.softmax its where=.",
        )
    if name in ("mul", "dot_general"):
        return Cause(
            f"0 * inf, out of {where}: a mask that is multiplied",
            "Choose instead of multiplying: jnp.where(mask, scores, "
            "jnp.finfo(scores.dtype).min).",
        )
    return Cause(
        f"{name} of an infinity is not defined; it comes out of {where}",
        "Use a finite constant, such as jnp.finfo(x.dtype).min.",
    )


_DERIVATIVES = {
    "sqrt": "0, where it is infinite",
    "rsqrt": "0, where it is infinite",
    "cbrt": "0, where it is infinite",
    "pow": "0, where it is infinite",
    "log": "0, where it is infinite",
    "log1p": "-1, where it is infinite",
    "div": "a denominator of 0",
    "acos": "1 or -1, where it is infinite",
    "asin": "1 or -1, where it is infinite",
    "acosh": "1, where it is infinite",
    "atanh": "1 or -1, where it is infinite",
    "atan2": "(0, 0)",
}


def _derivative(made: Origin, derivative_of: str) -> Cause:
    given = " and ".join(map(at, made.operands[:2]))
    safe = 0.5 if derivative_of in ("acos", "asin", "atanh") else 1.0
    norm = " A norm has no gradient at zeros." if "sqrt" in derivative_of else ""
    return Cause(
        f"the derivative of {derivative_of} at {_DERIVATIVES[derivative_of]}: "
        f"{made.primitive} of {given}. A `where` behind it does not help: the "
        "gradient is then 0 * inf, which is NaN",
        "Keep the argument away from there, by an eps inside, a clip, or a where "
        f"before it: safe = jnp.where(ok, x, {safe}); "
        f"y = jnp.where(ok, f(safe), 0.0).{norm}",
    )


def _other(made: Origin) -> Cause:
    given = ", ".join(map(at, made.operands[:3]))
    return Cause(
        f"{made.primitive} of {given} is {made.what}",
        "Look at the ranges of its operands, and keep them away from there.",
    )
