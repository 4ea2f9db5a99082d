"""`trace`: the range of every value that a function and its gradient compute."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmp import _tree
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.replay._program import read_program
from jaxmp.numerics.trace._meter import Meter
from jaxmp.numerics.trace._result import Trace
from jaxmp.policy import PolicyLike, get_policy


def trace(
    fn: Callable[..., Any],
    policy: PolicyLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    rules: Sequence[Any] = (),
    loss_scale: Any = None,
    argnums: int | Sequence[int] = 0,
    backward: bool | None = None,
) -> Callable[..., Trace]:
    """Measures every value that a function computes, forward and backward.

    It runs the function operation by operation, through loops, branches,
    `jax.checkpoint` and custom rules, which takes about as long as compiling it.

    Args:
      fn: function that can be jitted, such as a loss function. nnx modules may be
        arguments.
      policy: run it under `autocast(fn, policy, rules=rules)`; None runs it as it is.
      dtype: in which underflow and overflow are counted: `"float16"`, `"bfloat16"`,
        `"float8_e4m3fn"`, `"float8_e5m2"` or another floating dtype. None is the
        policy's compute dtype if that is half, and float16 otherwise.
      rules: of `autocast`.
      loss_scale: what the loss is multiplied by before the backward pass: a number, an
        optimizer state or a `LossScale`; None is 1.
      argnums: arguments to differentiate with respect to.
      backward: whether to look at the gradient; None does so if `fn` returns a floating
        scalar, alone or first in a tuple.

    Returns:
      A function of the arguments of `fn` that returns a `Trace`.

    Raises:
      NumericsError: if `dtype` is not a floating dtype.
      NonScalarLoss: when called, if `backward` is True and `fn` returns no loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import trace
      >>> def loss(w, x):
      ...     return jnp.mean(jnp.exp(w * x))
      >>> traced = trace(loss)(jnp.float32(1.0), jnp.array([12.0, 13.0]))
      >>> worst = traced.rows[0]
      >>> worst.operation, worst.overflows, worst.is_backward
      ('exp', 1.0, False)
    """
    if dtype is None:
        compute = None if policy is None else get_policy(policy).compute_dtype
        dtype = compute if compute in _tree.HALF else jnp.float16
    name = format_range(dtype).name

    def traced(*args: Any, **kwargs: Any) -> Trace:
        program = read_program(
            fn,
            args,
            kwargs,
            policy=policy,
            rules=rules,
            argnums=argnums,
            backward=backward,
            loss_scale=loss_scale,
        )
        meter = Meter(name)
        meter.run_program(program)
        rows = sorted(meter.rows(), key=lambda row: row.badness, reverse=True)
        return Trace(tuple(rows), name, program.loss_scale)

    return traced
