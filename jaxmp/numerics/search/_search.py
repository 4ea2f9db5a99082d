"""`search_policy`: what has to stay in float32, found by blame and by bisection.

    one run in float32       ->  the layers by the error that each adds in half, ranked
    bisection on the ranks   ->  the shortest prefix that is within the tolerance
    leaving out by halves    ->  a set from which no single member can be left out

Under a policy with `quantize` there are two searches. The first has all matmuls in
half, and finds what has to stay in float32. The second keeps that, and finds of which
layers the matmuls have to stay in half.

The blame decides how fast the search is, never what it returns: every set is evaluated
as it will be used, by `autocast` with its rules.

Sharp edges
- The search assumes that more in float32 is never worse. Where errors cancel, a smaller
  set may exist; the returned one is within the tolerance all the same.
- Of the policy, `compute_dtype`, `matmul_precision` and `quantize` count, as in
  `autocast`.
- The rule of a layer holds for everything inside it, and so does the rule of a
  primitive under a path.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp.errors import NumericsError
from jaxmp.numerics.compare._scales import scale_range
from jaxmp.numerics.compare._stand_in import stand_in, stand_in_rules
from jaxmp.numerics.compare.rows import tolerable
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.replay._program import Program, read_program, trying_rules
from jaxmp.numerics.search._blame import (
    measure_quantized,
    rank_by_blame,
    rank_quantized,
)
from jaxmp.numerics.search._half_operations import find_half_operations
from jaxmp.numerics.search._minimise import Units, minimise
from jaxmp.numerics.search._problem import BudgetSpent, Problem, progress_bar
from jaxmp.numerics.search._result import PolicySearch
from jaxmp.numerics.search._saved import Saved, digest
from jaxmp.numerics.search._units import rules_of, units_of
from jaxmp.policy import PolicyLike, get_policy

_TOLERANCE = 0.05


def search_policy(
    loss_fn: Callable[..., Any],
    policy: PolicyLike,
    *batches: Any,
    budget: int = 40,
    tolerance: float | None = None,
    rules: Sequence[Any] = (),
    loss_scale: Any = None,
    argnums: int | Sequence[int] = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> PolicySearch:
    """Finds the fewest layers and operations that have to stay in float32.

    Layers are the innermost name scopes, which Flax modules open by themselves. An
    operation outside all layers is named by its primitive and its function. Under a
    policy with `quantize`, the fewest layers are found whose matmuls stay in half, too.

    Args:
      loss_fn: returns a floating scalar, alone or first in a tuple. nnx modules may be
        arguments.
      policy: what `get_policy` takes; its compute dtype is float16 or bfloat16. It is
        applied by `autocast`, whose float32 operations stay as they are.
      *batches: for each call of `loss_fn` a tuple of its arguments, such as
        `(params, x, labels)`. The worst of them counts.
      budget: how many sets may be tried, those that `resume` holds included; each is
        one loss with its gradients for every batch.
      tolerance: the relative error that the loss, and the gradient of every parameter,
        may have. Healthy networks have about 0.002 in float16 and 0.015 in bfloat16,
        far below the noise of a batch; None is 0.05. For a policy that quantises, None
        is what `compare` tolerates: 0.23 in float8_e4m3fn, 0.1 in int8.
      rules: of `autocast`, for what is not kept. `[OpRule(function=".*",
        compute="float16")]` starts with everything in half.
      loss_scale: what losses are multiplied by before the backward pass: a number, an
        optimizer state or a `LossScale`. None is the power of two that puts the median
        of the backward pass into the middle of float16, and 1 for bfloat16.
      argnums: arguments to differentiate with respect to.
      resume: a file that keeps what was evaluated, so that a stopped search goes on.
      progress: whether to show a progress bar, if tqdm is installed; None does in a
        terminal.

    Returns:
      A `PolicySearch`, whose `rules` are for `autocast`.

    Raises:
      NumericsError: for a policy without a half dtype, a batch that is not a tuple, or
        a loss that is not finite in float32.
      NonScalarLoss: if `loss_fn` returns no loss.
      SearchStateMismatch: if `resume` holds another search.

    References:
      Junker, "QuickXplain: Preferred Explanations and Relaxations for
      Over-Constrained Problems", AAAI 2004, on leaving out by halves.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.numerics import search_policy
      >>> def loss(w, x):
      ...     with jax.named_scope("up"):
      ...         h = x @ w
      ...     with jax.named_scope("fragile"):
      ...         h = (h * 1e4) * 1e4 * 1e-8
      ...     with jax.named_scope("down"):
      ...         return jnp.mean((h @ w.T) ** 2)
      >>> w, x = jnp.full((4, 2), 0.5), jnp.ones((8, 4))
      >>> found = search_policy(loss, "mixed_float16", (w, x))
      >>> [kept.name for kept in found.kept]
      ['fragile']
    """
    policy = get_policy(policy)
    dtype = jnp.dtype(policy.compute_dtype)
    _check(dtype, batches, budget)

    def read(policy: PolicyLike | None = None, **options: Any) -> list[Program]:
        options = {"policy": policy, "argnums": argnums, "backward": True, **options}
        return [read_program(loss_fn, batch, {}, **options) for batch in batches]

    if loss_scale is None:
        loss_scale = 1.0
        if not format_range(dtype).has_range_of_float32:
            in_bfloat16 = read(stand_in(policy), rules=stand_in_rules(rules))
            loss_scale = scale_range(in_bfloat16, dtype).central
    # The rules of kept units come first, and may leave nothing for one of these.
    rules = tuple(dataclasses.replace(rule, allow_unused=True) for rule in rules)

    def under(kept: Units) -> list[Program]:
        with trying_rules():
            kept_rules = (*rules_of(kept), *rules)
            return read(policy, rules=kept_rules, loss_scale=loss_scale)

    plain = read(policy, rules=rules, loss_scale=loss_scale)
    exact = read(loss_scale=loss_scale)
    quantized = measure_quantized(plain)
    in_half = rank_quantized(quantized)
    if in_half:
        # What is to stay in float32 is looked for with every matmul in half.
        plain = under(tuple(in_half))
    if tolerance is None:
        tolerance = max(map(tolerable, quantized)) if in_half else _TOLERANCE
    half = find_half_operations(plain)
    in_float32 = rank_by_blame(exact, half, units_of(half), dtype)
    ranked = {**in_float32, **in_half}
    scale = plain[0].used_scale
    search = {
        "policy": str(policy),
        "rules": [str(rule) for rule in rules],
        "loss_scale": scale,
        "units": sorted(unit.name for unit in ranked),
        "batches": digest(batches),
    }
    saved = Saved(resume, search)

    with progress_bar(progress, budget) as advance:
        problem = Problem(under, exact, saved, budget, advance)
        units = tuple(in_float32), tuple(in_half)
        found, is_minimal = _search(*units, problem, tolerance)
    result = saved.evaluations[frozenset(unit.name for unit in found)]
    return PolicySearch(
        policy=str(policy),
        tolerance=tolerance,
        loss_scale=scale,
        kept=tuple(kept for unit, kept in ranked.items() if unit in found),
        rules=(*rules_of(found), *rules),
        result=result,
        evaluations=saved.most_half_first(),
        is_within=result.error <= tolerance,
        is_minimal=is_minimal,
    )


def _search(
    in_float32: Units, in_half: Units, problem: Problem, tolerance: float
) -> tuple[Units, bool]:
    """The smallest good set that the budget allowed, and whether it is minimal."""
    found: Units | None = None

    def is_good(kept: Units) -> bool:
        return problem.evaluate(kept).error <= tolerance

    try:
        if in_half and is_good(()):
            return (), True
        wide: Units | None = None
        for wide in minimise(in_float32, lambda kept: is_good((*kept, *in_half))):
            found = (*wide, *in_half)
        if wide is None:
            return (*in_float32, *in_half), True
        for narrow in minimise(in_half, lambda kept: is_good((*wide, *kept))):
            found = (*wide, *narrow)
    except BudgetSpent:
        return found or (), False
    return found or (), True


def _check(dtype: np.dtype, batches: Sequence[Any], budget: int) -> None:
    if budget < 1:
        raise NumericsError(f"budget={budget} allows no evaluation. Use 40.")
    if dtype not in _tree.HALF:
        raise NumericsError(
            "search_policy chooses between half and float32, and the policy computes "
            f"in {dtype}. Write 'mixed_float16' or 'mixed_bfloat16'."
        )
    if not batches or not all(isinstance(batch, tuple) for batch in batches):
        given = ", ".join(type(batch).__name__ for batch in batches) or "none"
        raise NumericsError(
            "search_policy takes for each batch the tuple of arguments that the loss "
            f"function is called with, and was given: {given}. Write "
            "search_policy(loss_fn, policy, (params, x, labels))."
        )
