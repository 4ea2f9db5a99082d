"""What went wrong in an operation: one function for each kind, from what it was given.

Each takes an `Origin` of kind `"made"` and returns a `Cause`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmp.errors import NumericsError
from jaxmp.numerics._formats import format_range
from jaxmp.numerics.nonfinite._origin import NARROW, Operand, Origin


class Cause(NamedTuple):
    """What happened, and what to do about it."""

    cause: str
    repair: str


def cause_of_operation(made: Origin, given: Any) -> Cause:
    """What went wrong in an operation on finite numbers, and its repair.

    Args:
      made: the origin.
      given: the equation that made its first operand, or None.
    """
    if made.site.primitive == "convert_element_type" and given is not None:
        return _cast_of(made, given)
    return _OPERATIONS.get(made.site.primitive, _other)(made)


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


def at(operand: Operand) -> str:
    """The operand's number at the element, or its range."""
    if operand.at is not None:
        return _number(operand.at)
    return f"numbers between {_number(operand.low)} and {_number(operand.high)}"


# One function for each kind of operation.


def _exponential(made: Origin) -> Cause:
    name = made.site.primitive
    return Cause(
        _overflows(made, f"{name} of {at(made.operands[0])}"),
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
            f"; an eps below {smallest} is 0 in {y.dtype}" if y.dtype in NARROW else ""
        )
        return Cause(
            f"{at(x)} / 0: a norm, a standard deviation or a sum that is 0{hint}",
            "Add an eps that the dtype can hold to the denominator, inside of a square "
            "root if there is one, or choose another denominator by jnp.where.",
        )
    return Cause(
        _overflows(made, f"{at(x)} / {at(y)}, a tiny denominator,"),
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
        "Scale x down before, and the result up afterwards, as "
        "m * jnp.linalg.norm(x / m) does for a norm.",
    )


def _product(made: Origin) -> Cause:
    x, y = made.operands[:2]
    return Cause(
        _overflows(made, f"{at(x)} * {at(y)}"),
        "Scale one factor down before.",
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
            _overflows(made, f"{at(x)} {sign} {at(y)}, a mask constant added,"),
            "Choose instead of adding: jnp.where(mask, scores, "
            "jnp.finfo(scores.dtype).min), once.",
        )
    return Cause(
        _overflows(made, f"{at(x)} {sign} {at(y)}"),
        "Scale down what is added.",
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
        _overflows(made, f"the sum over devices of {at(made.operands[0])}"),
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


def is_mask(made: Origin) -> bool:
    """Whether a cast makes infinite what is 0 or a large negative constant."""
    x = made.operands[0]
    is_cast = made.site.primitive == "convert_element_type"
    return is_cast and x.high <= 0 and x.low <= -1e5 and x.at in (x.low, None)


def _cast(made: Origin) -> Cause:
    dtype = made.operands[0].dtype
    if is_mask(made):
        low = _number(made.operands[0].low)
        return Cause(
            _overflows(made, f"the cast of a mask constant, {low},")
            + ": a row of a softmax that is masked throughout is then NaN",
            "Take the constant from the dtype, jnp.finfo(scores.dtype).min, and choose "
            "instead of adding: jnp.where(mask, scores, constant).",
        )
    return Cause(
        _overflows(made, f"the cast of {at(made.operands[0])} from {dtype}"),
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
        f"{name} of {at(made.operands[0])} {how}; it takes {_DOMAINS[name]}",
        "Clip the argument to inside of that: rounding alone can carry it out.",
    )


def _other(made: Origin) -> Cause:
    given = ", ".join(map(at, made.operands[:3]))
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
