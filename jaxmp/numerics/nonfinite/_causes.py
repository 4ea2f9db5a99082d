"""Why a NaN or an infinity was made, in plain words, and its repair.

`cause_of_operation` knows the operations on finite numbers. `explain` adds what holds
for all: derivatives, infinities that were there before, and the trap of `where`, whose
other branch the gradient meets.
"""

from typing import Any

from jaxmp.numerics.nonfinite._cause_of_operation import Cause, at, cause_of_operation
from jaxmp.numerics.nonfinite._origin import Origin, ancestors


def explain(
    made: Origin, derivative_of: str | None, is_hidden: bool, given: Any
) -> Cause:
    """The cause of an origin of kind `"made"` or `"undefined"`, and its repair.

    Args:
      made: the origin.
      derivative_of: the primitive that it is part of the derivative of, or None.
      is_hidden: whether the value of the function has it too, but does not show it.
      given: the equation that made its first operand, or None.
    """
    if made.kind == "undefined":
        cause, repair = _undefined(made)
    elif derivative_of in _DERIVATIVES and not _is_overflow(made):
        cause, repair = _derivative(made, derivative_of)
    else:
        cause, repair = cause_of_operation(made, given)
    if is_hidden and derivative_of is None:
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


def _is_overflow(made: Origin) -> bool:
    """Whether the operands at the element are ordinary numbers, none of them zero."""
    return all(x.at is not None and x.at != 0 for x in made.operands)


def _undefined(made: Origin) -> Cause:
    """A NaN out of infinities that nobody made: constants, or arguments."""
    name = made.site.primitive
    sources = {origin.kind for origin in ancestors(made.parents)}
    where = (
        "an infinity that the function was given"
        if "input" in sources
        else "an infinite constant (or one that is infinite in this dtype, as -1e9 is "
        "in float16)"
    )
    if name in ("sub", "add", "add_any", "reduce_sum"):
        return Cause(
            f"inf - inf, out of {where}: a row of a softmax that is masked throughout, "
            "or a mask that is added twice",
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
        f"{made.site.primitive} of {given}. A `where` behind it does not help, since "
        "the gradient is then 0 * inf, which is NaN",
        "Keep the argument away from there, by an eps inside, a clip, or a where "
        f"before it: safe = jnp.where(ok, x, {safe}); "
        f"y = jnp.where(ok, f(safe), 0.0).{norm}",
    )
