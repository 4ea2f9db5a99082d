"""How the policies of `jax.checkpoint` see a primitive of jaxmp's own."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.ad_checkpoint import Saveable
from jax.extend.core import Primitive
from jax.interpreters import partial_eval

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.types import Eqn

Stands = Callable[..., tuple[Primitive, Sequence[Any], dict[str, Any]]]


def save_as(primitive: Primitive, stands_for: Stands) -> None:
    """Shows a primitive to policies as another, which they know by its name.

    Args:
      primitive: has one result.
      stands_for: a function of its abstract operands and parameters. Returns the
        primitive to show, and the operands and parameters of that.
    """

    def rule(
        policy: Callable[..., Any],
        are_unknown: Sequence[bool],
        are_at_hand: Sequence[bool],
        eqn: Eqn,
    ) -> tuple[Any, ...]:
        # As JAX's own for primitives without one, in _partial_eval_jaxpr_custom.
        missing = [
            v
            for v, is_at_hand in zip(eqn.invars, are_at_hand, strict=True)
            if not (is_at_hand or is_literal(v))
        ]
        if any(are_unknown):
            return None, eqn, [True], [True], missing
        shown, avals, params = stands_for(*(v.aval for v in eqn.invars), **eqn.params)
        if _is_saved(policy(shown, *avals, **params)):
            return eqn, None, [False], [False], []
        return eqn, eqn, [False], [True], missing

    partial_eval.partial_eval_jaxpr_custom_rules[primitive] = rule


def _is_saved(answer: Any) -> bool:
    """Whether a policy says to save; what it wants to offload is computed again."""
    if isinstance(answer, bool):
        return answer
    return answer is Saveable
