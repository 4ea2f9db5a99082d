"""Why an operation made a NaN or an infinity, in plain words, and its repair.

One function for each kind of operation, from what it was given to a `Cause`. `explain`
adds what holds for all: the trap of `where`, whose other branch the gradient meets, and
the rule that keeps a layer in float32.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmp.errors import NumericsError
from jaxmp.numerics._formats import format_range
from jaxmp.numerics._provenance import Operand, Origin
from jaxmp.numerics._site import Site


class Cause(NamedTuple):
    """What happened, and what to do about it."""

    cause: str
    repair: str


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
    elif made.site.primitive == "convert_element_type" and given is not None:
        cause, repair = _cast_of(made, given)
    else:
        cause, repair = _OPERATIONS.get(made.site.primitive, _other)(made)
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
    return Cause(cause, f"{repair} {_rule(made)}".strip())


def layer_path(site: Site) -> str:
    """The scopes as `PolicyRule(path=...)` has them: without the root module's name."""
    scopes = site.scopes
    if scopes and re.fullmatch(r"[A-Z]\w*?(?<!_\d)(?<!_\d\d)", scopes[0]):
        scopes = scopes[1:]
    return "/".join(scopes)


def _rule(made: Origin) -> str:
    dtypes = [x.dtype for x in (*made.operands, made.result) if x is not None]
    if not any(dtype in _NARROW for dtype in dtypes):
        return ""
    path = layer_path(made.site)
    if not path:
        return "Or compute this in float32: x.astype(jnp.float32)."
    return (
        "Or keep this layer in float32: "
        f"rules=[jaxmp.PolicyRule(path={path!r}, compute='float32')]."
    )


_NARROW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def _is_overflow(made: Origin) -> bool:
    """Whether the operands at the element are ordinary numbers, none of them zero."""
    return all(x.at is not None and x.at != 0 for x in made.operands)


def _number(x: float) -> str:
    return f"{x:.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.4g}"


def _result(made: Origin) -> Operand:
    assert made.result is not None
    return made.result


def _overflows(made: Origin, what: str) -> str:
    dtype = _result(made).dtype
    try:
        largest = format_range(jnp.dtype(dtype)).largest
    except NumericsError:  # complex
        return f"{what} overflows {dtype}"
    return f"{what} overflows {dtype}, whose largest is {_number(largest)}"


def _at(operand: Operand) -> str:
    """The operand's number at the element, or its range."""
    if operand.at is not None:
        return _number(operand.at)
    return f"numbers between {_number(operand.low)} and {_number(operand.high)}"


# One function for each kind of operation.


def _exponential(made: Origin) -> Cause:
    name = made.site.primitive
    return Cause(
        _overflows(made, f"{name} of {_at(made.operands[0])}"),
        "Subtract the maximum first, as jax.nn.softmax, jax.nn.log_softmax and "
        "jax.nn.logsumexp do, or clip the argument.",
    )


def _logarithm(made: Origin) -> Cause:
    name = made.site.primitive
    x = made.operands[0]
    border = -1.0 if name == "log1p" else 0.0
    value = x.low if x.at is None else x.at
    if value < border:
        return Cause(
            f"{name} of {_number(value)}, which is negative"
            if name == "log"
            else f"{name} of {_number(value)}, which is below -1",
            "Find out why it is; jnp.maximum(x, tiny) would only hide it.",
        )
    smallest = _number(format_range(jnp.dtype(x.dtype)).smallest_subnormal)
    return Cause(
        f"{name} of {_number(border)}: a probability or a sum that was 0, or below "
        f"{smallest}, the smallest number of {x.dtype}, and became 0",
        "Take the logarithm where the probability is made: jax.nn.log_softmax, "
        "jax.nn.log_sigmoid or jax.nn.logsumexp; or add an eps that it can hold.",
    )


def _division(made: Origin) -> Cause:
    x, y = made.operands
    smallest = _number(format_range(jnp.dtype(y.dtype)).smallest_subnormal)
    if y.at == 0:
        hint = (
            f"; an eps below {smallest} is 0 in {y.dtype}" if y.dtype in _NARROW else ""
        )
        return Cause(
            f"{_at(x)} / 0: a norm, a standard deviation or a sum that is 0{hint}",
            "Add an eps that the dtype can hold to the denominator, inside of a square "
            "root if there is one, or choose another denominator by jnp.where.",
        )
    return Cause(
        _overflows(made, f"{_at(x)} / {_at(y)}, a tiny denominator,"),
        "Bound the denominator from below: jnp.maximum(x, eps).",
    )


def _root(made: Origin) -> Cause:
    name = made.site.primitive
    x = made.operands[0]
    value = x.low if x.at is None else x.at
    if value < 0:
        return Cause(
            f"{name} of {_number(value)}, which is negative: a variance computed as "
            "mean(x**2) - mean(x)**2 loses all its digits where the mean is large",
            "Subtract the mean first: jnp.mean((x - jnp.mean(x))**2), which is what "
            "jnp.var does and what use_fast_variance=False does in Flax.",
        )
    return Cause(
        f"{name} of 0: a norm or a variance of zeros",
        "Add an eps inside of the root that the dtype can hold.",
    )


def _power(made: Origin) -> Cause:
    params = made.site.eqn.params
    x = made.operands[0]
    exponent = params.get("y", 2)
    if made.site.primitive == "pow":
        exponent = made.operands[1].at
    shown = "y" if exponent is None else _number(exponent)
    value = x.high if x.at is None else x.at
    if value == 0 and (exponent is None or exponent < 0):
        return Cause(
            f"0 ** {shown}, which is infinite",
            "Add an eps that the dtype can hold, or choose another base by jnp.where.",
        )
    if value < 0 and made.what == "NaN":
        return Cause(
            f"{_number(value)} ** {shown}: a negative number to a broken power",
            "Take the power of jnp.maximum(x, 0) or jnp.abs(x).",
        )
    return Cause(
        _overflows(made, f"{_number(value)} ** {shown}"),
        "Scale x down before, and the result up afterwards in float32, as "
        "m * jnp.linalg.norm(x / m) does for a norm.",
    )


def _product(made: Origin) -> Cause:
    x, y = made.operands[:2]
    return Cause(
        _overflows(made, f"{_at(x)} * {_at(y)}"),
        "Scale one factor down before, or multiply in float32.",
    )


def _addition(made: Origin) -> Cause:
    sign = "-" if made.site.primitive == "sub" else "+"
    x, y = made.operands[:2]
    largest = format_range(jnp.dtype(x.dtype)).largest
    is_mask = any(
        operand.at is not None and operand.at <= -largest / 4 for operand in (x, y)
    )
    if is_mask:
        return Cause(
            _overflows(made, f"{_at(x)} {sign} {_at(y)}, a mask constant added,"),
            "Choose instead of adding: jnp.where(mask, scores, "
            "jnp.finfo(scores.dtype).min), once.",
        )
    return Cause(
        _overflows(made, f"{_at(x)} {sign} {_at(y)}"),
        "Add in float32.",
    )


def _sum(made: Origin) -> Cause:
    x, total = made.operands[0], _result(made)
    ratio = math.prod(x.shape) // max(math.prod(total.shape), 1)
    count = _summed(made) or ratio
    return Cause(
        _overflows(made, f"the sum of {count} values of about {_number(x.typical)}"),
        "Sum in float32: jnp.sum(x, dtype=jnp.float32); divide first for a mean.",
    )


def _summed(made: Origin) -> int | None:
    """How many values a cumulative or windowed sum adds up at most."""
    params, shape = made.site.eqn.params, made.operands[0].shape
    if "axis" in params and isinstance(params["axis"], int):
        return shape[params["axis"]]
    if "window_dimensions" in params:
        return math.prod(params["window_dimensions"])
    return None


def _psum(made: Origin) -> Cause:
    return Cause(
        _overflows(made, f"the sum over devices of {_at(made.operands[0])}"),
        "Sum in float32: jax.lax.psum(x.astype(jnp.float32), axis), or jax.lax.pmean "
        "of values divided before.",
    )


def _matmul(made: Origin) -> Cause:
    x, y = made.operands[:2]
    params = made.site.eqn.params
    if made.site.primitive == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        count = math.prod(x.shape[i] for i in contracted)
    else:
        count = math.prod(y.shape) // max(_result(made).shape[-1], 1)
    what = (
        f"a sum of {count} products of about {_number(x.typical)} * "
        f"{_number(y.typical)} (at most {_largest(x)} * {_largest(y)})"
    )
    return Cause(
        _overflows(made, what),
        "Scale the operands, such as the query by head_size**-0.5 before the product.",
    )


def _largest(x: Operand) -> str:
    return _number(max(abs(x.low), abs(x.high)))


def _cast(made: Origin) -> Cause:
    dtype = made.operands[0].dtype
    return Cause(
        _overflows(made, f"the cast of {_at(made.operands[0])} from {dtype}"),
        "Cast a smaller value, keep it in float32, or use bfloat16, whose range is "
        "that of float32.",
    )


def _cast_of(made: Origin, given: Any) -> Cause:
    """A cast, knowing what made its operand: JAX sums float16 in float32."""
    if given.primitive.name != "reduce_sum":
        return _cast(made)
    (x,), total = given.invars, given.outvars[0]
    count = math.prod(x.aval.shape) // max(math.prod(total.aval.shape), 1)
    value = made.operands[0].at
    typical = made.operands[0].typical if value is None else abs(value)
    return Cause(
        _overflows(
            made, f"the sum of {count} values of about {_number(typical / count)}"
        ),
        "Keep the sum in float32: jnp.sum(x, dtype=jnp.float32); for a mean, divide "
        "before it is cast.",
    )


def _scatter(made: Origin) -> Cause:
    x = made.operands[-1]
    return Cause(
        _overflows(
            made,
            f"the sum of values of about {_number(x.typical)} in one row, as in the "
            "gradient of an embedding whose row is looked up often,",
        ),
        "Add in float32: cast the table where it is used, not the rows' gradients.",
    )


_DOMAINS = {
    "acos": "-1 to 1",
    "asin": "-1 to 1",
    "atanh": "-1 to 1",
    "acosh": "1 and above",
    "erf_inv": "-1 to 1",
    "lgamma": "positive numbers",
    "digamma": "positive numbers",
}


def _domain(made: Origin) -> Cause:
    name = made.site.primitive
    how = "is infinite" if made.what == "Inf" else "is not defined"
    return Cause(
        f"{name} of {_at(made.operands[0])} {how}; it takes {_DOMAINS[name]}",
        "Clip the argument to inside of that: rounding alone can carry it out.",
    )


def _other(made: Origin) -> Cause:
    given = ", ".join(map(_at, made.operands[:3]))
    name = made.site.primitive
    return Cause(
        f"{name} of {given} is {made.what}",
        "Look at the operands' ranges, and keep them away from there.",
    )


_OPERATIONS: dict[str, Callable[[Origin], Cause]] = {
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _exponential),
    **dict.fromkeys(("log", "log1p"), _logarithm),
    **dict.fromkeys(("sqrt", "rsqrt", "cbrt"), _root),
    **dict.fromkeys(("pow", "integer_pow", "square"), _power),
    **dict.fromkeys(("add", "sub", "add_any"), _addition),
    **dict.fromkeys(
        ("reduce_sum", "cumsum", "reduce_window_sum", "cumlogsumexp"), _sum
    ),
    **dict.fromkeys(("psum", "psum_invariant", "reduce_scatter"), _psum),
    **dict.fromkeys(("dot_general", "conv_general_dilated"), _matmul),
    **dict.fromkeys(("scatter-add", "scatter_add"), _scatter),
    **dict.fromkeys(_DOMAINS, _domain),
    "div": _division,
    "mul": _product,
    "convert_element_type": _cast,
}


def _undefined(made: Origin) -> Cause:
    """A NaN out of infinities that nobody made: constants, or arguments."""
    name = made.site.primitive
    sources = {parent.kind for parent in _sources(made)}
    where = (
        "an infinite constant (or one that is infinite in this dtype, as -1e9 is in "
        "float16)"
        if "constant" in sources
        else "an infinity that the function was given"
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


def _sources(made: Origin) -> list[Origin]:
    found, pending = [], list(made.parents)
    while pending:
        origin = pending.pop()
        found.append(origin)
        pending.extend(origin.parents)
    return found


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
    given = " and ".join(map(_at, made.operands[:2]))
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
