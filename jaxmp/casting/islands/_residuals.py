"""What the backward pass of an island keeps, and what it computes again.

A mean, a variance or a row's maximum is a few numbers, and reads a whole array. Such
results are kept. Only what is as large as the inputs is computed again from them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxmp._jaxpr.atoms import variables
from jaxmp._jaxpr.execution import result_avals
from jaxmp._jaxpr.types import Eqn, Var
from jaxmp.casting.islands import _arithmetic
from jaxmp.casting.plan.plan import EqnPlan

# A float32 number for eight half ones is a quarter of their bytes.
_SHRINKS = 8
# Their derivatives are made of their results.
_NEED_RESULT = frozenset(
    ("cbrt", "exp", "exp2", "expm1", "logistic", "rsqrt", "sqrt", "tanh")
)


class Residuals(NamedTuple):
    """What happens to the results of an island in its backward pass.

    Attributes:
      kept: equations whose results are kept.
      again: equations that are computed again.
    """

    kept: tuple[EqnPlan, ...]
    again: tuple[EqnPlan, ...]


def largest_small(inputs: Iterable[Any]) -> int:
    """How many elements a result may have to be kept.

    Args:
      inputs: of the island: anything with a `size`.
    """
    return max((x.size for x in inputs), default=0) // _SHRINKS


def keep_small(limit: int) -> Callable[..., bool]:
    """A policy for `jax.checkpoint` that keeps results of up to `limit` elements."""

    def policy(primitive: Any, *avals: Any, **params: Any) -> bool:
        return all(x.size <= limit for x in result_avals(primitive, avals, params))

    return policy


def bends_large(eqn: Eqn, limit: int) -> bool:
    """Whether the gradient of an equation needs something that is not small."""
    atoms = (*eqn.invars, *eqn.outvars)
    is_large = any(v.aval.size > limit for v in atoms)
    return is_large and _arithmetic.is_nonlinear(eqn)


def residuals_of(members: Sequence[EqnPlan], inputs: Sequence[Var]) -> Residuals:
    """What of an island is kept, and what is computed again."""
    limit = largest_small([v.aval for v in inputs])
    needed: set[Var] = set()
    kept, again = [], []
    for plan in reversed(members):
        eqn = plan.eqn
        is_needed = not needed.isdisjoint(eqn.outvars)
        if _arithmetic.is_nonlinear(eqn):
            needed.update(variables(eqn.invars))
            is_needed |= eqn.primitive.name in _NEED_RESULT
        if is_needed and all(v.aval.size <= limit for v in eqn.outvars):
            kept.append(plan)
        elif is_needed:
            again.append(plan)
            needed.update(variables(eqn.invars))
    return Residuals(tuple(reversed(kept)), tuple(reversed(again)))
