"""`compare`: what each policy does to the activations and gradients of a function.

    reference   fn in float32
    forward     autocast(fn, policy)                       ->  activations, by operation
    scales      the same with its gradient, in bfloat16    ->  what loss scale it needs
    gradients   the same with its gradient, at that scale  ->  gradients, by parameter

Sharp edges
- All activations of the reference stay in memory until the last policy is compared.
- Of a policy, `compute_dtype`, `matmul_precision` and `quantize` count, as in
  `autocast`.
- Operations run one at a time, and every result is rounded: XLA may round less.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxmp.numerics.compare._candidates import Candidate, read_candidates
from jaxmp.numerics.compare._forward import Forward, compare_forward
from jaxmp.numerics.compare._gradients import Gradients, compare_gradients
from jaxmp.numerics.compare._reference import run_reference, widened
from jaxmp.numerics.compare._result import Comparison
from jaxmp.numerics.compare._scales import Scales, find_scales
from jaxmp.numerics.compare.rows import (
    ActivationRow,
    GradientRow,
    MatmulRow,
    PolicyRow,
    matmul_rows,
    tolerable,
)
from jaxmp.numerics.replay._program import read_program

Row = TypeVar("Row", ActivationRow, GradientRow, MatmulRow)


def compare(
    fn: Callable[..., Any],
    policies: Any,
    *args: Any,
    rules: Sequence[Any] = (),
    loss_scale: Any = None,
    argnums: int | Sequence[int] = 0,
    reference: str = "float32",
    **kwargs: Any,
) -> Comparison:
    """Compares a function with itself under policies, layer by layer.

    Check before a long run what each policy does to activations and gradients, and
    which loss scales its backward pass needs. Under a policy with `quantize`, what each
    matmul in float8 or int8 adds by itself is measured as well.

    Args:
      fn: function that can be jitted. If it returns a floating scalar, alone or first
        in a tuple, that is the loss, and gradients are compared as well. nnx modules
        may be arguments.
      policies: a policy, or a sequence of them: what `get_policy` takes. Each is
        applied by `autocast`.
      *args: what the function is called with.
      rules: of `autocast`, for every policy.
      loss_scale: what the losses are multiplied by before the backward pass: a number,
        an optimizer state or a `LossScale`. By default it is, for each policy, the
        smallest power of two at which nothing becomes zero or subnormal; if something
        overflows there, the largest at which nothing does; but never less than 1.
      argnums: arguments to differentiate with respect to.
      reference: the dtype of the reference, to which floating arguments are cast:
        `"float32"`, or `"float64"` while x64 is enabled.
      **kwargs: passed on to `fn`.

    Returns:
      A `Comparison`, whose rows are sorted worst first.

    Raises:
      NumericsError: for an unsupported `reference`, or no policy at all.
      PolicyError: for a policy that cannot be read.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018,
      https://arxiv.org/abs/1710.03740, section 3.2, on loss scales.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import compare
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2) * 1e-6
      >>> w, x = jnp.full((4, 2), 0.5), jnp.ones((8, 4))
      >>> compared = compare(loss, ["bfloat16", "float16"], w, x)
      >>> row = compared.policy("float16")
      >>> row.smallest_scale, row.largest_scale, row.gradient_error < 1e-3
      (256.0, 17179869184.0, True)
    """
    read = functools.partial(read_program, fn, argnums=argnums)
    wide = widened((args, kwargs), reference)
    candidates = read_candidates(policies, rules, functools.partial(read, args, kwargs))
    exact = run_reference(functools.partial(read, *wide))
    policy_rows, activations, matmuls, gradient_rows = [], [], [], []
    for candidate in candidates:
        forward = compare_forward(candidate, exact)
        scales = find_scales(candidate, loss_scale)
        gradients = compare_gradients(candidate, exact, scales)
        policy_rows.append(_policy_row(candidate, forward, scales, gradients))
        activations += forward.rows
        matmuls += matmul_rows(candidate.policy, gradients.matmuls or forward.matmuls)
        gradient_rows += gradients.rows
    return Comparison(
        reference=reference,
        policies=tuple(policy_rows),
        activations=_worst_first(activations),
        gradients=_worst_first(gradient_rows),
        matmuls=_worst_first(matmuls),
    )


def _policy_row(
    candidate: Candidate, forward: Forward, scales: Scales, gradients: Gradients
) -> PolicyRow:
    fits, errors = scales.range, [row.relative_error for row in gradients.rows]
    return PolicyRow(
        policy=candidate.policy,
        dtype=str(candidate.dtype),
        output_error=forward.output_error,
        limit=tolerable(gradients.matmuls or forward.matmuls),
        gradient_error=max(errors, default=None),
        loss_scale=gradients.loss_scale,
        largest_scale=fits and fits.largest,
        smallest_scale=fits and fits.smallest,
        lost_unscaled=fits and fits.lost_unscaled,
        lost_at_largest=fits and fits.lost_at_largest,
    )


def _worst_first(rows: list[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: row.badness, reverse=True))
