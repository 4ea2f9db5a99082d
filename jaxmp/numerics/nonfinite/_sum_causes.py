"""What goes wrong in sums, matmuls and casts of finite numbers, and its repair.

One function for each kind of operation reads what it was given, and gave.
"""

import math
from collections.abc import Callable

from jaxmp._jaxpr.primitives import CAST, SCALED_DOT
from jaxmp._jaxpr.types import Eqn
from jaxmp.numerics.nonfinite._cause import Cause, at, number, overflows
from jaxmp.numerics.nonfinite._origin import Operand, Origin


def _sum(made: Origin) -> Cause:
    x, total = made.operands[0], made.gave
    ratio = math.prod(x.shape) // max(math.prod(total.shape), 1)
    count = _summed(made) or ratio
    return Cause(
        overflows(made, f"the sum of {count} values of about {number(x.typical)}"),
        "Sum in float32: jnp.sum(x, dtype=jnp.float32); divide first for a mean.",
    )


def _summed(made: Origin) -> int | None:
    """How many values a cumulative or windowed sum adds up at most."""
    params, shape = made.params, made.operands[0].shape
    if "axis" in params and isinstance(params["axis"], int):
        return shape[params["axis"]]
    if "window_dimensions" in params:
        return math.prod(params["window_dimensions"])
    return None


def _psum(made: Origin) -> Cause:
    return Cause(
        overflows(made, f"the sum over devices of {at(made.operands[0])}"),
        "Sum in float32: jax.lax.psum(x.astype(jnp.float32), axis), or divide by the "
        "number of devices first.",
    )


def _matmul(made: Origin) -> Cause:
    x, y = made.operands[:2]
    params = made.params
    if made.primitive in ("dot_general", SCALED_DOT):
        (contracted, _), _ = params["dimension_numbers"]
        count = math.prod(x.shape[i] for i in contracted)
    else:
        count = math.prod(y.shape) // max(made.gave.shape[-1], 1)
    what = (
        f"a sum of {count} products of about {number(x.typical)} * "
        f"{number(y.typical)} (at most {_largest(x)} * {_largest(y)})"
    )
    return Cause(
        overflows(made, what),
        "Scale the operands, such as the query by head_size**-0.5 before the product.",
    )


def _largest(x: Operand) -> str:
    return number(max(abs(x.low), abs(x.high)))


def _scatter(made: Origin) -> Cause:
    x = made.operands[-1]
    return Cause(
        overflows(
            made,
            f"the sum of values of about {number(x.typical)} in one row, as in the "
            "gradient of an embedding whose row is looked up often,",
        ),
        "Add in float32: cast the table where it is used, not the rows' gradients.",
    )


def _cast(made: Origin) -> Cause:
    dtype = made.operands[0].dtype
    if is_mask(made):
        low = number(made.operands[0].low)
        return Cause(
            overflows(made, f"the cast of a mask constant, {low},")
            + ": a softmax row that is masked throughout is then NaN",
            "Take the constant from the dtype, jnp.finfo(scores.dtype).min, and choose "
            "instead of adding: jnp.where(mask, scores, constant).",
        )
    return Cause(
        overflows(made, f"the cast of {at(made.operands[0])} from {dtype}"),
        "Cast a smaller value, keep it in float32, or use bfloat16, whose range is "
        "that of float32.",
    )


def cast_of(made: Origin, given: Eqn) -> Cause:
    """A cast, knowing what made its operand: JAX sums float16 in float32."""
    if given.primitive.name != "reduce_sum":
        return _cast(made)
    (x,), total = given.invars, given.outvars[0]
    count = math.prod(x.aval.shape) // max(math.prod(total.aval.shape), 1)
    value = made.operands[0].at
    typical = made.operands[0].typical if value is None else abs(value)
    return Cause(
        overflows(
            made, f"the sum of {count} values of about {number(typical / count)}"
        ),
        "Keep the sum in float32: jnp.sum(x, dtype=jnp.float32); for a mean, divide "
        "before it is cast.",
    )


def is_mask(made: Origin) -> bool:
    """Whether a cast makes infinite what is 0 or a large negative constant."""
    x = made.operands[0]
    is_cast = made.primitive == CAST
    return is_cast and x.high <= 0 and x.low <= -1e5 and x.at in (x.low, None)


CAUSES: dict[str, Callable[[Origin], Cause]] = {
    **dict.fromkeys(
        ("reduce_sum", "cumsum", "reduce_window_sum", "cumlogsumexp"), _sum
    ),
    **dict.fromkeys(("psum", "psum_invariant", "reduce_scatter"), _psum),
    **dict.fromkeys(("dot_general", SCALED_DOT, "conv_general_dilated"), _matmul),
    **dict.fromkeys(("scatter-add", "scatter_add"), _scatter),
    CAST: _cast,
}
