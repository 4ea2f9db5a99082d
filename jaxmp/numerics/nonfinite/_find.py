"""`find_nonfinite`: the first operation that makes a NaN or an infinity that matters.

    the function alone    ->  something not finite comes out:  divergence
    then with gradients   ->  something not finite comes out:  is it finite at a lower
                              loss scale?  handled overflow : divergence

What comes out is followed back through the operands that are to blame (`_tracker`) to
the operations that made a NaN or an infinity out of finite numbers. The first of them
in the order of execution is the one.

An infinity that reaches no output does not matter: `-inf` in a mask, `exp` that
overflows in 1 / (1 + exp(x)), `log(0)` behind a `where`. Nor does an infinite constant
or argument that comes out as it went in, unless as the loss or a gradient.

Sharp edges
- Operations run one at a time, in the dtypes that they have; only loops are compiled,
  until they show something. XLA simplifies log(exp(x)) to x: in a loop here,
  and wherever it compiles the whole step, that exp cannot overflow.
- The function is run several times, its callbacks never or several times.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxmp.errors import JaxmpError
from jaxmp.numerics.nonfinite._float32_remedy import (
    Remedy,
    remedy_of_operation,
    remedy_under_autocast,
)
from jaxmp.numerics.nonfinite._look import Found, look
from jaxmp.numerics.nonfinite._report import NonfiniteReport
from jaxmp.numerics.nonfinite._sum_causes import is_mask
from jaxmp.numerics.replay._float32_lines import Line
from jaxmp.numerics.replay._program import Program, read_program, trying_rules
from jaxmp.policy import PolicyLike


def find_nonfinite(
    fn: Callable[..., Any],
    *args: Any,
    policy: PolicyLike | None = None,
    rules: Sequence[Any] = (),
    loss_scale: Any = None,
    argnums: int | Sequence[int] = 0,
    backward: bool | None = None,
    **kwargs: Any,
) -> NonfiniteReport:
    """Finds the first operation that makes a NaN or Inf which reaches the result.

    It runs the function operation by operation, and then once more with its gradient,
    through loops, branches, `jax.checkpoint` and custom rules. To look into a saved bad
    batch, call it on the saved parameters and batch with the saved loss scale.

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
      A `NonfiniteReport`, which is False if everything that comes out is finite, and
      prints as plain words.

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
    found = look(program)
    if found is None:
        return NonfiniteReport(loss_scale=program.loss_scale)
    remedy = _remedy(found, policy, functools.partial(_retry, read, rules, found))
    return dataclasses.replace(
        found.report,
        repair=f"{found.report.repair} {remedy.advice}".rstrip(),
        float32_helps=remedy.works,
    )


def _remedy(
    found: Found, policy: PolicyLike | None, retry: Callable[..., Line | bool]
) -> Remedy:
    """What float32 mends, tried before it is advised."""
    if found.site is None or not found.origin.is_narrow or is_mask(found.origin):
        return Remedy()
    scale = found.report.finite_at_scale
    if scale is not None and scale >= 1:
        # A lower loss scale mends it, and dynamic loss scaling finds that.
        return Remedy()
    if policy is None:
        return remedy_of_operation(found.origin, found.site)
    return remedy_under_autocast(found.line, found.site, retry)


def _retry(
    read: Callable[..., Program],
    rules: Sequence[Any],
    found: Found,
    more: Sequence[Any],
    lines: frozenset[Line],
) -> Line | bool:
    """The line that is not finite with more in float32; True if there is none."""
    is_handled = found.report.kind == "handled overflow"
    try:
        with trying_rules():
            program = read(rules=[*more, *rules], in_float32=lines)
    except JaxmpError:
        # A rule of the user's that now matches nothing.
        return False
    again = look(program, lower_scale=not is_handled)
    if again is None or again.report.kind == "handled overflow":
        return True
    return again.line or False
