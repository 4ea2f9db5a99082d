"""What goes wrong in elementwise operations on finite numbers, and its repair.

One function for each kind of operation reads what it was given, and gave.
"""

from collections.abc import Callable

from jaxmp.numerics.nonfinite._cause import Cause, at, number, overflows
from jaxmp.numerics.nonfinite._origin import NARROW, Origin
from jaxmp.numerics.ranges._formats import format_range


def _exponential(made: Origin) -> Cause:
    name = made.primitive
    return Cause(
        overflows(made, f"{name} of {at(made.operands[0])}"),
        "Subtract the maximum first, as jax.nn.softmax, jax.nn.log_softmax and "
        "jax.nn.logsumexp do, or clip the argument.",
    )


def _logarithm(made: Origin) -> Cause:
    name = made.primitive
    x = made.operands[0]
    border = -1.0 if name == "log1p" else 0.0
    value = x.low if x.at is None else x.at
    if value < border:
        return Cause(
            f"{name} of {number(value)}, which is negative"
            if name == "log"
            else f"{name} of {number(value)}, which is below -1",
            "Find out why it is; jnp.maximum(x, tiny) would only hide it.",
        )
    smallest = number(format_range(x.dtype).smallest_subnormal)
    return Cause(
        f"{name} of {number(border)}: a probability or a sum that was 0, or below "
        f"{smallest}, the smallest number of {x.dtype}, and became 0",
        "Take the logarithm where the probability is made: jax.nn.log_softmax, "
        "jax.nn.log_sigmoid or jax.nn.logsumexp; or add an eps that it can hold.",
    )


def _division(made: Origin) -> Cause:
    x, y = made.operands
    smallest = number(format_range(y.dtype).smallest_subnormal)
    if y.at == 0:
        hint = (
            f"; an eps below {smallest} is 0 in {y.dtype}" if y.dtype in NARROW else ""
        )
        return Cause(
            f"{at(x)} / 0: a norm, a standard deviation or a sum that is 0{hint}",
            "Add an eps that the dtype can hold to the denominator, inside the square "
            "root if there is one, or choose another denominator by jnp.where.",
        )
    return Cause(
        overflows(made, f"{at(x)} / {at(y)}, a tiny denominator,"),
        "Bound the denominator from below: jnp.maximum(x, eps).",
    )


def _root(made: Origin) -> Cause:
    name = made.primitive
    x = made.operands[0]
    value = x.low if x.at is None else x.at
    if value < 0:
        return Cause(
            f"{name} of {number(value)}, which is negative: a variance computed as "
            "mean(x**2) - mean(x)**2 loses all its digits where the mean is large",
            "Subtract the mean first: jnp.mean((x - jnp.mean(x))**2), which is what "
            "jnp.var does and what use_fast_variance=False does in Flax.",
        )
    return Cause(
        f"{name} of 0: a norm or a variance of zeros",
        "Add an eps inside the root that the dtype can hold.",
    )


def _power(made: Origin) -> Cause:
    params = made.params
    x = made.operands[0]
    exponent = params.get("y", 2)
    if made.primitive == "pow":
        exponent = made.operands[1].at
    shown = "y" if exponent is None else number(exponent)
    value = x.high if x.at is None else x.at
    if value == 0 and (exponent is None or exponent < 0):
        return Cause(
            f"0 ** {shown}, which is infinite",
            "Add an eps that the dtype can hold, or choose another base by jnp.where.",
        )
    if value < 0 and made.what == "NaN":
        return Cause(
            f"{number(value)} ** {shown}: a negative number to a fractional power",
            "Take the power of jnp.maximum(x, 0) or jnp.abs(x).",
        )
    return Cause(
        overflows(made, f"{number(value)} ** {shown}"),
        "Scale x down before, and the result up afterwards, as "
        "m * jnp.linalg.norm(x / m) does for a norm.",
    )


def _product(made: Origin) -> Cause:
    x, y = made.operands[:2]
    return Cause(
        overflows(made, f"{at(x)} * {at(y)}"),
        "Scale one factor down first.",
    )


def _addition(made: Origin) -> Cause:
    sign = "-" if made.primitive == "sub" else "+"
    x, y = made.operands[:2]
    largest = format_range(x.dtype).largest
    is_mask = any(
        operand.at is not None and operand.at <= -largest / 4 for operand in (x, y)
    )
    if is_mask:
        return Cause(
            overflows(made, f"{at(x)} {sign} {at(y)}, a mask constant added,"),
            "Choose instead of adding: jnp.where(mask, scores, "
            "jnp.finfo(scores.dtype).min), once.",
        )
    return Cause(
        overflows(made, f"{at(x)} {sign} {at(y)}"),
        "Scale down what is added.",
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
    name = made.primitive
    how = "is infinite" if made.what == "Inf" else "is not defined"
    return Cause(
        f"{name} of {at(made.operands[0])} {how}; it takes {_DOMAINS[name]}",
        "Clip the argument to that range: rounding alone can carry it outside.",
    )


CAUSES: dict[str, Callable[[Origin], Cause]] = {
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _exponential),
    **dict.fromkeys(("log", "log1p"), _logarithm),
    **dict.fromkeys(("sqrt", "rsqrt", "cbrt"), _root),
    **dict.fromkeys(("pow", "integer_pow", "square"), _power),
    **dict.fromkeys(("add", "sub", "add_any"), _addition),
    **dict.fromkeys(_DOMAINS, _domain),
    "div": _division,
    "mul": _product,
}
