"""Plans jaxprs: the backward pass, the calls, and what users decided."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_integer, is_literal
from jaxmp._jaxpr.jax_functions import is_in_special_function
from jaxmp._jaxpr.marks import is_in_layer, is_on_half_operands, scopes
from jaxmp._jaxpr.primitives import LAYOUT, SELECTING
from jaxmp._jaxpr.scopes import is_backward
from jaxmp._jaxpr.sources import written
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.ops import _registry, _user_rules
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import (
    SPECIAL_FUNCTION,
    Context,
    Decision,
    JaxprPlan,
    Settings,
    decided_by_scope,
)
from jaxmp.casting.plan.states import FLOAT32, State, low
from jaxmp.casting.planner._call_contents import Contents, contents_of
from jaxmp.casting.planner._forward import Painter
from jaxmp.casting.sums import _carries as _sums
from jaxmp.errors import AutocastRuleError


class Planner:
    """Plans jaxprs under one setting, each of them once."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.low = low(settings.compute_dtype)
        self.used_rules: set[_user_rules.OpRule] = set()
        # Keyed by id; `_alive` keeps the jaxprs from being collected meanwhile.
        self._plans: dict[Any, JaxprPlan] = {}
        self._wants: dict[Any, Wants] = {}
        self._contents: dict[int, Contents] = {}
        self._sums: dict[Any, frozenset[int]] = {}
        self._alive: list[Any] = []

    # Backward

    def wants(
        self, jaxpr: Any, out_wants: Sequence[bool], context: Context
    ) -> tuple[bool, ...]:
        """Tells which inputs of a jaxpr are wanted low, given which outputs are."""
        return self._analyse(jaxpr, tuple(out_wants), context).inputs

    def updates(
        self, jaxpr: Any, index: int, out: int, length: int | None, context: Context
    ) -> frozenset[int]:
        """The ids of the equations that update a loop's carry as a sum; see `_sums`.

        There are none if it is no sum.
        """
        jaxpr = open_jaxpr(jaxpr)
        key = (id(jaxpr), index, out, length, context.in_backward)
        if key not in self._sums:
            self._alive.append(jaxpr)
            is_sum = _sums.is_sum(jaxpr, *key[1:])
            found = _sums.updates(jaxpr, index, out) if is_sum else ()
            self._sums[key] = frozenset(found)
        return self._sums[key]

    def wanted(
        self, jaxpr: Any, out_wants: Sequence[bool], context: Context
    ) -> frozenset[Any]:
        """The values of a jaxpr that are wanted low, given which outputs are."""
        return self._analyse(jaxpr, tuple(out_wants), context).values

    def _analyse(self, jaxpr, out_wants, context) -> "Wants":
        jaxpr = open_jaxpr(jaxpr)
        key = (id(jaxpr), out_wants, context)
        if key in self._wants:
            return self._wants[key]
        wanted = {
            v
            for v, want in zip(jaxpr.outvars, out_wants, strict=True)
            if want and not is_literal(v)
        }
        rounded = set(wanted)
        for eqn in reversed(jaxpr.eqns):
            results = [v in wanted for v in eqn.outvars]
            wants = self._eqn_wants(eqn, results, context)
            operands = {
                v
                for v, want in zip(eqn.invars, wants, strict=True)
                if want and not is_literal(v)
            }
            wanted |= operands
            if self._rounds(eqn, rounded):
                rounded |= operands
        self._alive.append(jaxpr)
        inputs = tuple(v in wanted for v in jaxpr.invars)
        self._wants[key] = Wants(inputs, frozenset(wanted), frozenset(rounded))
        return self._wants[key]

    def _eqn_wants(self, eqn, results, context) -> Iterable[bool]:
        nothing = (False,) * len(eqn.invars)
        if id(eqn) in context.updates or not any(map(castable_dtype, eqn.invars)):
            return nothing
        name = eqn.primitive.name
        call = _registry.call_rule(name)
        decided = None if is_in_layer(eqn) else self.decided(eqn, context)
        if decided is not None:
            is_low = decided.dtype in _tree.HALF
            return tuple(is_low and castable_dtype(v) is not None for v in eqn.invars)
        if call is not None:
            return call.wants(eqn, results, self, self.inside(eqn, context))
        if name == "convert_element_type":
            to_half = eqn.params["new_dtype"] in _tree.HALF
            return (
                to_half or (results[0] and castable_dtype(eqn.invars[0]) is not None),
            )
        entry = _registry.entry(name)
        if entry.op_class is OpClass.COMPUTE:
            is_kept = self.matmul_intent(eqn) is not None
            return tuple(
                not is_kept and castable_dtype(v) is not None for v in eqn.invars
            )
        if entry.op_class is OpClass.FOLLOW and any(results):
            return tuple(castable_dtype(v) is not None for v in eqn.invars)
        return nothing

    def _rounds(self, eqn, rounded) -> bool:
        """Whether the operands that an equation wants low are rounded as they are."""
        name = eqn.primitive.name
        call = _registry.call_rule(name)
        if call is None:
            passes_on = name in LAYOUT or name == "convert_element_type"
            is_end = _registry.entry(name).op_class is OpClass.COMPUTE
        else:
            passes_on = False
            is_end = any(self.contents(body).has_matmul for body in call.bodies(eqn))
        passes_on = passes_on or self.selects(eqn)
        return is_end or (passes_on and eqn.outvars[0] in rounded)

    # Forward

    def plan(
        self,
        jaxpr: Any,
        in_states: Sequence[State | None],
        out_wants: Sequence[bool],
        context: Context = Context(),  # noqa: B008
        consts: Sequence[Any] = (),
    ) -> JaxprPlan:
        """Plans a jaxpr.

        Args:
          jaxpr: with or without its constants.
          in_states: the state of each input.
          out_wants: whether each output is wanted low.
          context: inherited from the call that it is the body of.
          consts: values of its `constvars`, for those that float16 cannot hold.
        """
        jaxpr = open_jaxpr(jaxpr)
        in_states, out_wants = tuple(in_states), tuple(out_wants)
        key = (id(jaxpr), in_states, out_wants, context)
        if key not in self._plans:
            self._alive.append(jaxpr)
            wants = self._analyse(jaxpr, out_wants, context)
            painter = Painter(self, jaxpr, in_states, wants, context, consts)
            self._plans[key] = painter.paint(out_wants)
        return self._plans[key]

    def contents(self, jaxpr: Any) -> Contents:
        """Summarises what the equations of a jaxpr are, bodies of calls included."""
        jaxpr = open_jaxpr(jaxpr)
        if id(jaxpr) not in self._contents:
            self._alive.append(jaxpr)
            self._contents[id(jaxpr)] = contents_of(self, jaxpr)
        return self._contents[id(jaxpr)]

    # Decisions that need no states

    def decided(self, eqn: Any, context: Context) -> Decision | None:
        """What the user decided about an equation, wherever it stands."""
        decision = decided_by_scope(eqn)
        if not self.settings.rules:
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
        return Decision(rule.compute, f"rule {_show(rule)}", rule)

    def carry_dtype(self, loop: Any, context: Context) -> Any:
        """The dtype that the user decided for what a loop carries, or None."""
        rule = self._matching(loop, context, "carry")
        return None if rule is None else rule.carry

    def _matching(
        self, eqn: Any, context: Context, decides: str
    ) -> _user_rules.OpRule | None:
        """The first rule that matches an equation and decides about something."""
        around = context.scopes + scopes(eqn)
        for rule in self.settings.rules:
            if getattr(rule, decides) is None:
                continue
            if _user_rules.matches(rule, eqn.primitive.name, around, eqn):
                self.used_rules.add(rule)
                return rule
        return None

    def _check_half_operands(self, eqn: Any, context: Context) -> None:
        """Raises if a rule wants in float32 what was traced on half operands."""
        around = context.scopes + scopes(eqn)
        for rule in self.settings.rules:
            is_general = rule.primitive is None and rule.compute is not None
            if is_general and _user_rules.matches(rule, "", around, eqn):
                self.used_rules.add(rule)
                if rule.compute == FLOAT32:
                    raise _rule_came_late(rule, eqn)
                return

    def _check_inside(self, eqn: Any, rule: _user_rules.OpRule) -> None:
        """The same for a call that a rule keeps in float32 as a whole."""
        call = _registry.call_rule(eqn.primitive.name)
        for body in () if call is None else call.bodies(eqn):
            inner = self.contents(body).on_half_operands
            if inner is not None:
                raise _rule_came_late(rule, inner)

    def matmul_intent(self, eqn: Any) -> str | None:
        """Why a matmul keeps the dtypes it was traced with, or None.

        Integers are exact and take the dtype of the other operand.
        """
        operands = eqn.invars[:2]
        traced = [d for d in map(castable_dtype, operands) if d is not None]
        result = castable_dtype(eqn.outvars[0])
        if result is None or not traced or not all(map(_can_be_float, operands)):
            return "no float32 matmul"
        if all(dtype in _tree.HALF for dtype in traced):
            if result == FLOAT32:
                return "a float32 result was asked of half operands"
            return "traced in half"
        precision = eqn.params.get("precision")
        for part in precision if isinstance(precision, tuple) else (precision,):
            if part is not None and part not in _LOWERABLE:
                return f"precision={part}"
        if is_in_special_function(eqn):
            return SPECIAL_FUNCTION
        return None

    def is_special(self, eqn: Any) -> bool:
        """Tells whether an equation is part of a special function, or calls one."""
        call = _registry.call_rule(eqn.primitive.name)
        bodies = () if call is None else call.bodies(eqn)
        is_call = bool(bodies) and all(self.contents(b).is_special for b in bodies)
        return is_call or is_in_special_function(eqn)

    def selects(self, eqn: Any) -> bool:
        """Tells whether the entries of a result are entries of an operand, or numbers.

        Such as what `relu` and pooling by maximum return.
        """
        call = _registry.call_rule(eqn.primitive.name)
        if call is not None:
            eqns = [inner for body in call.bodies(eqn) for inner in body.eqns]
            eqns = [inner for inner in eqns if any(map(_is_array, inner.outvars))]
            return bool(eqns) and all(map(self.selects, eqns))
        is_selection = eqn.primitive.name in SELECTING
        return is_selection and sum(map(_is_array, eqn.invars)) == 1

    def inside(self, eqn: Any, context: Context) -> Context:
        """The context of the bodies of a call."""
        around = context.scopes
        if self.settings.rules:
            around = (*around, *scopes(eqn))
        in_backward = context.in_backward or is_backward(eqn)
        return context._replace(scopes=around, in_backward=in_backward)


_LOWERABLE = (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH)


class Wants(NamedTuple):
    """Which values of a jaxpr are wanted low.

    Attributes:
      inputs: for each input whether it is.
      values: all of them.
      rounded: those that are rounded as they are, before arithmetic is done with them.
    """

    inputs: tuple[bool, ...]
    values: frozenset[Any]
    rounded: frozenset[Any]


def _rule_came_late(rule: _user_rules.OpRule, eqn: Any) -> AutocastRuleError:
    """A trace inside of another, as of a loop's body, knows no names around it."""
    source = written(eqn.source_info.traceback).source
    return AutocastRuleError(
        f"The rule {_show(rule)} asks for float32 in a function that was traced on "
        f"half operands, at {source}: what the rule matches was not known there. Put "
        "jaxmp.full_precision around the function there."
    )


def _can_be_float(atom: Any) -> bool:
    return castable_dtype(atom) is not None or is_integer(atom)


def _is_array(atom: Any) -> bool:
    """False for a number."""
    return getattr(atom.aval, "size", 0) != 1


def _show(rule: _user_rules.OpRule) -> str:
    conditions = {
        name: getattr(rule, name)
        for name in ("primitive", "path", "function")
        if getattr(rule, name) is not None
    }
    text = ", ".join(f"{k}={v!r}" for k, v in conditions.items())
    return f"({text})"
