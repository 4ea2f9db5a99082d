"""What the user decided about an equation: by rules, or by the scopes around it."""

from collections.abc import Sequence

import numpy as np

from jaxmp._jaxpr.marks import (
    AUTOCAST_SCOPE,
    FULL_PRECISION_SCOPE,
    HALF_SCOPE,
    LAYER_SCOPE,
    is_on_half_operands,
    scopes,
)
from jaxmp._jaxpr.scopes import scope_names
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Eqn
from jaxmp.casting.ops._user_rules import OpRule, matches
from jaxmp.casting.plan.plan import LAYER_REASON, Context, Decision
from jaxmp.casting.plan.states import FLOAT32
from jaxmp.casting.planner._call_contents import CallContents
from jaxmp.errors import AutocastRuleError

_BY_SCOPE = {
    FULL_PRECISION_SCOPE: Decision(FLOAT32, "full_precision"),
    AUTOCAST_SCOPE: Decision(None, "decided by the autocast inside"),
    LAYER_SCOPE: Decision(None, LAYER_REASON),
    HALF_SCOPE: Decision(
        None, "traced on half operands: sums and softmax inside are the function's"
    ),
}


class UserDecisions:
    """Reads a user's rules and scopes.

    Args:
      rules: the rules.
      contents: what calls are made of.
      as_written: whether everything counts as decided, like a layer of Flax.

    Attributes:
      used: the rules that matched something so far.
    """

    def __init__(
        self, rules: Sequence[OpRule], contents: CallContents, as_written: bool = False
    ):
        self._rules = rules
        self._as_written = as_written
        self._contents = contents
        self.used: set[OpRule] = set()

    def about(self, eqn: Eqn, context: Context) -> Decision | None:
        """What was decided about an equation, wherever it stands."""
        decision = _by_scope(eqn)
        if decision is None and self._as_written:
            return _BY_SCOPE[LAYER_SCOPE]
        if not self._rules:
            return decision
        if decision is not None:
            if is_on_half_operands(eqn):
                self._check_half_operands(eqn, context)
            return decision
        rule = self._matching(eqn, context, "compute")
        if rule is None:
            return None
        if rule.compute == FLOAT32:
            self._check_inside(eqn, rule)
        return Decision(rule.compute, f"rule {_conditions(rule)}", rule)

    def carry_dtype(self, loop: Eqn, context: Context) -> np.dtype | None:
        """The dtype that was decided for what a loop carries."""
        rule = self._matching(loop, context, "carry")
        return None if rule is None else rule.carry

    def quantization(self, matmul: Eqn, context: Context) -> OpRule | None:
        """The first rule that says how a matmul is multiplied, or in which dtype."""
        return self._matching(matmul, context, "quantize", "compute")

    def _matching(self, eqn: Eqn, context: Context, *decides: str) -> OpRule | None:
        """The first rule that matches an equation and decides about something."""
        around = context.scopes + scopes(eqn)
        for rule in self._rules:
            if all(getattr(rule, name) is None for name in decides):
                continue
            if matches(rule, eqn.primitive.name, around, eqn):
                self.used.add(rule)
                return rule
        return None

    def _check_half_operands(self, eqn: Eqn, context: Context) -> None:
        """Raises if a rule wants in float32 what was traced on half operands."""
        around = context.scopes + scopes(eqn)
        for rule in self._rules:
            is_general = rule.primitive is None and rule.compute is not None
            if is_general and matches(rule, "", around, eqn):
                self.used.add(rule)
                if rule.compute == FLOAT32:
                    raise _came_late(rule, eqn)
                return

    def _check_inside(self, eqn: Eqn, rule: OpRule) -> None:
        """The same for a call that a rule keeps in float32 as a whole."""
        for body in self._contents.of_bodies(eqn):
            if body.on_half_operands is not None:
                raise _came_late(rule, body.on_half_operands)


def _by_scope(eqn: Eqn) -> Decision | None:
    """What the innermost of jaxmp's own scopes says about an equation."""
    names = (name for name in reversed(scope_names(eqn)) if name in _BY_SCOPE)
    return _BY_SCOPE.get(next(names, ""))


def _came_late(rule: OpRule, eqn: Eqn) -> AutocastRuleError:
    """A trace inside another, as of a loop's body, knows no names around it."""
    return AutocastRuleError(
        f"The rule {_conditions(rule)} asks for float32 in a function that was traced "
        f"on half operands, at {Site(eqn).source}: what the rule matches was not known "
        "there. Put jaxmp.full_precision around the function there."
    )


def _conditions(rule: OpRule) -> str:
    conditions = {
        name: getattr(rule, name)
        for name in ("primitive", "path", "function")
        if getattr(rule, name) is not None
    }
    return f"({', '.join(f'{k}={v!r}' for k, v in conditions.items())})"
