"""The forward pass of a plan: one dtype for every equation of a jaxpr.

An equation is asked about in an order, and the first answer holds: what the user
decided, what a call is made of, the class of its primitive, its neighbours.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.calls import JITS
from jaxmp._jaxpr.jax_functions import is_in_special_function, is_promotion
from jaxmp._jaxpr.marks import has_half_gradients, is_border
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr
from jaxmp.casting.islands._schedule import schedule
from jaxmp.casting.ops import _registry
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import (
    LAYER_REASON,
    SPECIAL_FUNCTION,
    Context,
    Decision,
    EqnPlan,
    JaxprPlan,
    as_island,
)
from jaxmp.casting.plan.states import (
    FLOAT32,
    FULL,
    KEPT,
    NEUTRAL,
    PINNED,
    Kind,
    State,
    as_read,
    traced_state,
)
from jaxmp.casting.planner._following import Choice, Follower, choose
from jaxmp.casting.planner._intents import is_outer_product, matmul_intent
from jaxmp.casting.planner._interface import Planner, Wants
from jaxmp.casting.planner._outcomes import Outcomes, States
from jaxmp.casting.planner._weights import Weights, apart, repeating, wide_gradient
from jaxmp.casting.quantized._decision import quantizing
from jaxmp.casting.sums._unrolled import unrolled_sums


class ForwardPass:
    """One pass over the equations of one jaxpr.

    Args:
      planner: plans the bodies of calls.
      jaxpr: without its constants.
      in_states: the states of its inputs.
      wants: what the backward pass found.
      context: of its equations.
      consts: values of its `constvars`.
    """

    def __init__(
        self,
        planner: Planner,
        jaxpr: Jaxpr,
        in_states: tuple[State | None, ...],
        wants: Wants,
        context: Context,
        consts: Sequence[Any],
    ):
        self.planner = planner
        self.jaxpr = jaxpr
        self.in_states = in_states
        self.wants = wants
        self.context = context
        self.states = dict(zip(jaxpr.invars, in_states, strict=True))
        self.states.update((v, traced_state(v)) for v in jaxpr.constvars)
        self.outcomes = Outcomes(planner, jaxpr, context, consts)
        self.sums = unrolled_sums(jaxpr)
        self.weights = Weights()

    def plan(self, out_wants: Sequence[bool]) -> JaxprPlan:
        """Plans the equations in their order, and groups them into islands."""
        eqns = []
        for eqn in self.jaxpr.eqns:
            plan = self.equation(eqn, [self.state(v) for v in eqn.invars])
            plan = quantizing(plan, self.planner, self.context)
            self.states.update(zip(eqn.outvars, plan.out_states, strict=True))
            eqns.append(plan)
        out_states = tuple(
            self.output_state(v, want)
            for v, want in zip(self.jaxpr.outvars, out_wants, strict=True)
        )
        recompute = self.planner.settings.recompute
        steps = schedule(eqns, self.jaxpr, self.in_states, out_states, recompute)
        return JaxprPlan(self.jaxpr, self.in_states, out_states, eqns, steps)

    def state(self, atom: Atom) -> State | None:
        """The state of an operand."""
        return traced_state(atom) if is_literal(atom) else self.states[atom]

    def output_state(self, atom: Atom, want: bool) -> State | None:
        """The state in which an output is handed back."""
        state = as_read(atom, self.state(atom))
        if want and state is not None and state.kind is Kind.FULL:
            return self.planner.low
        return state

    def equation(self, eqn: Eqn, states: States) -> EqnPlan:
        """Plans an equation, by what the user decided or by what it is."""
        if self.planner.settings.is_plain:
            return self.outcomes.untouched(eqn, "float32 is the policy: as traced")
        in_backward = self.outcomes.in_backward(eqn)
        if not self.planner.settings.wide_gradients:
            return apart(self.read_equation(eqn, states, states), in_backward)
        read = [as_read(v, s) for v, s in zip(eqn.invars, states, strict=True)]
        if in_backward:
            plan = apart(self.read_equation(eqn, read, read), in_backward)
            is_wide = id(eqn) in self.planner.weight_gradients
            return wide_gradient(plan) if is_wide else plan
        decision = self.planner.user.about(eqn, self.context)
        plan = self.weights.handed_on(eqn, states, decision, self.outcomes)
        if plan is not None:
            return plan
        plan = self.read_equation(eqn, read, states)
        is_half = has_half_gradients(eqn, self.context.half_gradients)
        plan = self.weights.read_by(plan, states, is_half)
        return plan if is_half else repeating(plan)

    def read_equation(self, eqn: Eqn, states: States, stored: States) -> EqnPlan:
        """Plans an equation that reads its operands.

        Args:
          eqn: the equation.
          states: those in which most operations find the operands.
          stored: those in which they are kept: weights are known as such.
        """
        planner, outcomes = self.planner, self.outcomes
        call = _registry.call_rule(eqn.primitive.name)
        if not any(states) and not any(map(castable_dtype, eqn.outvars)):
            bodies = planner.contents.of_bodies(eqn)
            if not any(body.has_float for body in bodies):
                return outcomes.untouched(eqn, "no floating operand")
        decision = planner.user.about(eqn, self.context)
        if decision is None and call is not None and planner.contents.is_special(eqn):
            decision = Decision(FLOAT32, SPECIAL_FUNCTION)
        is_whole = call is None or getattr(decision, "dtype", "") in (FLOAT32, None)
        if decision is not None and is_whole:
            is_entered = call and self.is_entered(eqn, decision, stored)
            if not is_entered:
                return self.decided(eqn, states, decision)
        if call is None:
            return self.operation(eqn, states)
        whole = self.whole_call(eqn, states, call)
        if whole is not None:
            return whole
        wants = tuple(v in self.wants.values for v in eqn.outvars)
        inside = planner.inside(eqn, self.context)
        entering = stored if call.takes_weights else states
        return call.plan(eqn, entering, wants, planner, inside)

    def is_entered(self, eqn: Eqn, decision: Decision, stored: States) -> bool:
        """Whether a call in a layer of Flax is planned inside: it has a matmul there.

        One of a weight that gets its gradient in float32, as in `einsum`, or one that
        may be quantised.
        """
        takes = any(s is not None and s.kind is Kind.WEIGHT for s in stored)
        bodies = self.planner.contents.of_bodies(eqn)
        is_product = any(body.has_matmul for body in bodies)
        is_asked_for = takes or bool(self.planner.matmuls)
        return is_asked_for and is_product and decision.reason == LAYER_REASON

    def operation(self, eqn: Eqn, states: States) -> EqnPlan:
        """Plans an equation that is not a call, by the class of its primitive."""
        name, outcomes = eqn.primitive.name, self.outcomes
        if name == CAST:
            return self.cast(eqn, states)
        entry = _registry.entry(name)
        if entry.op_class is OpClass.COMPUTE:
            return self.matmul(eqn, states, entry.reason)
        if entry.op_class is OpClass.FULL:
            return outcomes.full(eqn, states, entry.reason)
        if self.has_lookup(eqn) and self.is_lookup(eqn, states):
            return outcomes.lookup(eqn)
        if entry.op_class is OpClass.FOLLOW:
            reads_half = any(s is not None and s.is_low for s in states)
            if reads_half and is_in_special_function(eqn):
                return outcomes.full(eqn, states, SPECIAL_FUNCTION)
            return outcomes.follow(eqn, states, self.choice(eqn, states))
        plan = outcomes.untouched(eqn, entry.reason)
        is_active = any(s not in (None, NEUTRAL) for s in states)
        return as_island(plan) if is_active else plan

    def matmul(self, eqn: Eqn, states: States, reason: str) -> EqnPlan:
        """Half, unless the program says otherwise about this one or its operands.

        What it returns is an ordinary value either way.
        """
        kinds = {s.kind for s in states if s is not None}
        intent = matmul_intent(eqn)
        if intent is None and Kind.PINNED in kinds:
            intent = "an operand was cast to float32"
        if intent is not None:
            return as_island(self.outcomes.untouched(eqn, intent))
        in_backward = self.outcomes.in_backward(eqn)
        is_outside = kinds <= {Kind.NEUTRAL} and not in_backward
        if is_outside and is_outer_product(eqn):
            return self.outcomes.outside(eqn, "a product without a sum")
        halves = {castable_dtype(v) for v in eqn.invars[:2]} & _tree.HALF
        return self.outcomes.compute(eqn, states, reason, *halves)

    def cast(self, eqn: Eqn, states: States) -> EqnPlan:
        """A cast that changes a dtype means it; one that does not is ignored."""
        source, target = states[0], eqn.params["new_dtype"]
        traced, outcomes = castable_dtype(eqn.invars[0]), self.outcomes
        if is_border(eqn) and source is not None and target in _tree.CASTABLE:
            params = {**eqn.params, "new_dtype": source.dtype}
            reason = "a half result, shown to code written for float32"
            return EqnPlan(
                eqn, OpClass.FOLLOW, reason, (None,), (source,), params=params
            )
        if traced is None or target not in _tree.CASTABLE:
            return outcomes.untouched(eqn, "cast from or to what is no float")
        if traced == target:
            return outcomes.follow(eqn, states, self.choice(eqn, states))
        if target in _tree.HALF:
            outs = (outcomes.made_in(eqn, target),)
            return EqnPlan(eqn, OpClass.UNTOUCHED, f"cast to {target}", (None,), outs)
        if source is None or not source.is_low:
            return outcomes.untouched(eqn, "cast to float32")
        if outcomes.in_backward(eqn) or is_promotion(eqn):
            return outcomes.follow(eqn, states, self.without_cast(eqn, source))
        return outcomes.full(eqn, states, "cast to float32 by the program", PINNED)

    def without_cast(self, eqn: Eqn, source: State) -> Choice:
        """What follows a cast to float32 that was not asked for.

        It was made for an operand of another dtype, or is the gradient of a cast.
        """
        if eqn.outvars[0] in self.wants.values:
            return Choice(source, "a promotion by JAX decides nothing")
        if self.outcomes.in_backward(eqn):
            return Choice(KEPT, "the gradient of a cast to half")
        return Choice(FULL, "no matmul reads the result in half")

    def decided(self, eqn: Eqn, states: States, decision: Decision) -> EqnPlan:
        """Plans what the user decided about."""
        if decision.dtype is None:
            is_layer = decision.reason == LAYER_REASON
            if is_layer and self.has_lookup(eqn) and self.is_lookup(eqn, states):
                return self.outcomes.lookup(eqn)
            plan = self.outcomes.untouched(eqn, decision.reason)
            is_cast_to_half = (
                eqn.primitive.name == CAST and eqn.params["new_dtype"] in _tree.HALF
            )
            if not is_cast_to_half or states[0] is None:
                return plan
            # It says how its operand is read: from an island, in half.
            return dataclasses.replace(plan, in_dtypes=(eqn.params["new_dtype"],))
        op_class = _registry.entry(eqn.primitive.name).op_class
        if decision.dtype == FLOAT32:
            plan = self.outcomes.full(eqn, states, decision.reason)
        elif op_class is OpClass.UNTOUCHED:
            plan = self.operation(eqn, states)
        else:
            dtype = decision.dtype
            plan = self.outcomes.compute(eqn, states, decision.reason, dtype)
        return dataclasses.replace(plan, rule=decision.rule)

    def whole_call(self, eqn: Eqn, states: States, call: Any) -> EqnPlan | None:
        """Plans a call without a matmul in it like one operation, where that is sound.

        Args:
          eqn: the call.
          states: of its operands.
          call: the rule of its primitive.
        """
        bodies, outcomes = self.planner.contents.of_bodies(eqn), self.outcomes
        if not call.is_composite or any(body.has_matmul for body in bodies):
            return None
        if call.is_loop:
            if eqn.effects or self.planner.settings.rules:
                return None
            if any(body.has_half for body in bodies):
                return outcomes.untouched(eqn, "a loop that was written in half")
            return outcomes.full(eqn, states, "a loop without a matmul in it")
        if not all(body.is_simple for body in bodies):
            return None
        if not eqn.outvars:
            return outcomes.untouched(eqn, "a call that returns nothing")
        if any(body.has_full for body in bodies):
            return outcomes.full(eqn, states, "a call of float32 operations")
        if self.has_lookup(eqn) and self.is_lookup(eqn, states):
            return outcomes.lookup(eqn)
        choice = self.choice(eqn, states)
        return None if choice.state.is_low else outcomes.follow(eqn, states, choice)

    def has_lookup(self, eqn: Eqn) -> bool:
        """Whether an equation is a gather, or a simple `jit` around one."""
        if eqn.primitive.name == "gather":
            return True
        is_call = eqn.primitive.name in JITS and len(eqn.outvars) == 1
        bodies = self.planner.contents.of_bodies(eqn)
        return is_call and any(b.has_lookup and b.is_simple for b in bodies)

    def is_lookup(self, eqn: Eqn, states: States) -> bool:
        """Rows looked up in a table of parameters are activations, from there on."""
        table, rows = eqn.invars[0], eqn.outvars[0]
        return (
            not self.outcomes.constants.is_constant(table)
            and all(s is None or s.kind is Kind.NEUTRAL for s in states)
            and castable_dtype(rows) == FLOAT32
            and rows in self.wants.values
        )

    def choice(self, eqn: Eqn, states: States) -> Choice:
        """What an operation follows, unless half cannot hold what it reads or sums."""
        outcomes = self.outcomes
        in_backward, low = outcomes.in_backward(eqn), self.planner.low
        follower = Follower(eqn, states, self.wants, low, in_backward, outcomes.islands)
        choice = choose(follower)
        if not choice.state.is_low:
            return choice
        bad = outcomes.constants.unfit(eqn.invars, choice.state.dtype)
        if bad is not None:
            return Choice(FULL, bad)
        if id(eqn) in self.sums and choice.state.kind is Kind.LOW:
            return Choice(FULL, "part of a sum of many terms")
        return choice
