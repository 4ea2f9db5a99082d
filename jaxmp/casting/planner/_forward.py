"""The forward pass of a plan: one dtype for every equation of a jaxpr."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_integer, is_literal
from jaxmp._jaxpr.jax_functions import is_in_special_function, is_promotion
from jaxmp._jaxpr.marks import is_border
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.scopes import is_backward
from jaxmp.casting.islands._label_gather import has_pick
from jaxmp.casting.islands._schedule import schedule
from jaxmp.casting.ops import _registry
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import (
    SPECIAL_FUNCTION,
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
    low,
    traced_state,
)
from jaxmp.casting.planner._ambient_precision import precision_params
from jaxmp.casting.planner._call_contents import is_cheap
from jaxmp.casting.planner._constants import Constants
from jaxmp.casting.planner._island_inputs import Feeds
from jaxmp.casting.sums._unrolled import unrolled_sums

# Products and quotients with an island's result are gates and normalisations; sums
# with it are residual streams.
_GATES = frozenset(("mul", "div"))
_DEFAULT = (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT)
# What a checkpoint policy saves by name is saved in half.
_BARRIERS = frozenset(("name", "optimization_barrier"))


class Painter:
    """One forward pass over the equations of one jaxpr."""

    def __init__(self, planner, jaxpr, in_states, wants, context, consts):
        self.planner = planner
        self.jaxpr = jaxpr
        self.in_states = in_states
        self.wanted = wants.values
        self.rounded = wants.rounded
        self.context = context
        self.states: dict[Any, State | None] = dict(
            zip(jaxpr.invars, in_states, strict=True)
        )
        self.states.update((v, traced_state(v)) for v in jaxpr.constvars)
        self.constants = Constants(planner.settings.compute_dtype, jaxpr, consts)
        self.feeds = Feeds()
        self.sums = unrolled_sums(jaxpr)

    def paint(self, out_wants: tuple[bool, ...]) -> JaxprPlan:
        eqns = []
        for eqn in self.jaxpr.eqns:
            plan = self.paint_eqn(eqn)
            self.states.update(zip(eqn.outvars, plan.out_states, strict=True))
            eqns.append(plan)
        out_states = [
            self.output_state(v, want)
            for v, want in zip(self.jaxpr.outvars, out_wants, strict=True)
        ]
        in_states, recompute = tuple(self.in_states), self.planner.settings.recompute
        steps = schedule(eqns, self.jaxpr, in_states, out_states, recompute)
        return JaxprPlan(self.jaxpr, in_states, tuple(out_states), eqns, steps)

    def output_state(self, atom: Any, want: bool) -> State | None:
        state = self.state(atom)
        if want and state is not None and state.kind is Kind.FULL:
            return self.planner.low
        return state

    def state(self, atom: Any) -> State | None:
        return traced_state(atom) if is_literal(atom) else self.states[atom]

    def in_backward(self, eqn: Any) -> bool:
        return self.context.in_backward or is_backward(eqn)

    def paint_eqn(self, eqn: Any) -> EqnPlan:
        name = eqn.primitive.name
        states = [self.state(v) for v in eqn.invars]
        if self.planner.settings.is_plain:
            return self.untouched(eqn, states, "float32 is the policy: as traced")
        if not any(states) and not any(map(castable_dtype, eqn.outvars)):
            call = _registry.call_rule(name)
            inner = () if call is None else call.bodies(eqn)
            if not any(self.planner.contents(body).has_float for body in inner):
                return self.untouched(eqn, states, "no floating operand")
        decided = self.planner.decided(eqn, self.context)
        call = _registry.call_rule(name)
        if decided is None and call is not None and self.planner.is_special(eqn):
            decided = Decision(FLOAT32, SPECIAL_FUNCTION)
        if decided is not None and (call is None or decided.dtype in (FLOAT32, None)):
            return self.decided(eqn, states, decided)
        if call is not None:
            plan = self.composite(eqn, states, call)
            if plan is not None:
                return plan
            inside = self.planner.inside(eqn, self.context)
            wants = tuple(v in self.wanted for v in eqn.outvars)
            return call.plan(eqn, states, wants, self.planner, inside)
        return self.operation(eqn, states)

    def operation(self, eqn: Any, states: list[State | None]) -> EqnPlan:
        """Plans an equation that is no call."""
        if eqn.primitive.name == "convert_element_type":
            return self.cast(eqn, states)
        entry = _registry.entry(eqn.primitive.name)
        if entry.op_class is OpClass.COMPUTE:
            return self.matmul(eqn, states, entry.reason)
        if entry.op_class is OpClass.FULL:
            return self.full(eqn, states, entry.reason)
        if eqn.primitive.name == "gather" and self.is_lookup(eqn, states):
            return self.lookup(eqn)
        if entry.op_class is OpClass.FOLLOW:
            reads_half = any(s is not None and s.is_low for s in states)
            if reads_half and is_in_special_function(eqn):
                return self.full(eqn, states, SPECIAL_FUNCTION)
            return self.follow(eqn, states, self.chosen(eqn, states))
        plan = self.untouched(eqn, states, entry.reason)
        is_active = any(s not in (None, NEUTRAL) for s in states)
        return as_island(plan) if is_active else plan

    # One method per outcome

    def untouched(self, eqn, states, reason) -> EqnPlan:
        outs = tuple(traced_state(v) for v in eqn.outvars)
        dtypes = tuple(map(castable_dtype, eqn.invars))
        params = precision_params(eqn, self.planner.settings)
        return EqnPlan(eqn, OpClass.UNTOUCHED, reason, dtypes, outs, params=params)

    def matmul(self, eqn, states, reason) -> EqnPlan:
        """Half, unless the program says otherwise about this one or its operands.

        What it returns is an ordinary value either way.
        """
        kinds = {s.kind for s in states if s is not None}
        intent = self.planner.matmul_intent(eqn)
        if intent is None and Kind.PINNED in kinds:
            intent = "an operand was cast to float32"
        if intent is not None:
            return as_island(self.untouched(eqn, states, intent))
        is_outside = kinds <= {Kind.NEUTRAL} and not self.in_backward(eqn)
        if is_outside and _is_outer_product(eqn):
            return self.full(eqn, [None] * len(states), "a product without a sum")
        halves = {castable_dtype(v) for v in eqn.invars[:2]} & _tree.HALF
        return self.compute(eqn, reason, *halves)

    def compute(self, eqn, reason, dtype=None) -> EqnPlan:
        dtype = dtype or self.planner.settings.compute_dtype
        bad = self.constants.unfit(eqn.invars, dtype)
        if bad is not None:
            states = [self.state(v) for v in eqn.invars]
            return self.full(eqn, states, bad)
        if dtype == FLOAT32:
            params = precision_params(eqn, self.planner.settings)
            in_dtypes = tuple(castable_dtype(v) and FLOAT32 for v in eqn.invars)
            outs = tuple(castable_dtype(v) and NEUTRAL for v in eqn.outvars)
            return EqnPlan(eqn, OpClass.COMPUTE, reason, in_dtypes, outs, params=params)
        backward = self.in_backward(eqn)
        state = State(Kind.GRADIENT if backward else Kind.LOW, dtype)
        plan = self.at(eqn, state, OpClass.COMPUTE, reason)
        if eqn.primitive.name not in MATMULS:
            return plan
        if any(map(is_integer, eqn.invars[:2])):
            plan.in_dtypes = (dtype, dtype, *plan.in_dtypes[2:])
        if self.planner.settings.ambient and eqn.params["precision"] is None:
            # JAX would give its gradients the ambient precision.
            plan.params = {**(plan.params or eqn.params), "precision": _DEFAULT}
        return plan

    def at(self, eqn, state: State, op_class, reason) -> EqnPlan:
        """Operands and results in one half dtype."""
        in_dtypes = tuple(castable_dtype(v) and state.dtype for v in eqn.invars)
        outs = tuple(castable_dtype(v) and state for v in eqn.outvars)
        params = _registry.params_at(eqn.primitive.name, eqn.params, state.dtype)
        return EqnPlan(eqn, op_class, reason, in_dtypes, outs, params=params)

    def full(self, eqn, states, reason, out: State | None = None) -> EqnPlan:
        """Operands in float32, as part of an island unless all come from outside."""
        is_active = any(
            s is not None and s.kind is not Kind.NEUTRAL and not is_literal(v)
            for v, s in zip(eqn.invars, states, strict=True)
        )
        state = out or (FULL if is_active else NEUTRAL)
        outs = tuple(
            None if dtype is None else low(dtype) if dtype in _tree.HALF else state
            for dtype in map(castable_dtype, eqn.outvars)
        )
        in_dtypes = tuple(castable_dtype(v) and FLOAT32 for v in eqn.invars)
        can_join = eqn.outvars and not eqn.effects and is_cheap(self.planner, eqn)
        in_island = is_active and bool(can_join)
        if in_island:
            self.feeds.add(eqn, states)
        params = precision_params(eqn, self.planner.settings)
        return EqnPlan(eqn, OpClass.FULL, reason, in_dtypes, outs, in_island, params)

    def follow(self, eqn, states, choice: "_Choice") -> EqnPlan:
        state, reason = choice
        if state.is_low:
            plan = self.at(eqn, state, OpClass.FOLLOW, reason)
            self.feeds.moved(eqn)
            if eqn.primitive.name == "gather" and not has_pick(eqn):
                # Its gradient adds up in the dtype in which it is gathered from.
                wide = tuple(dtype and FLOAT32 for dtype in plan.in_dtypes)
                plan = dataclasses.replace(plan, in_dtypes=wide)
        elif state.kind is Kind.NEUTRAL:
            plan = self.full(eqn, [None] * len(states), reason)
            self.constants.carry(eqn)
        else:
            plan = self.full(eqn, states, reason, state)
        return dataclasses.replace(plan, op_class=OpClass.FOLLOW)

    def cast(self, eqn, states) -> EqnPlan:
        """A cast that changes a dtype means it; one that does not is no operation."""
        source, target = states[0], eqn.params["new_dtype"]
        traced = castable_dtype(eqn.invars[0])
        if is_border(eqn) and source is not None and target in _tree.CASTABLE:
            params = {**eqn.params, "new_dtype": source.dtype}
            reason = "a half result, shown to code written for float32"
            return EqnPlan(
                eqn, OpClass.FOLLOW, reason, (None,), (source,), params=params
            )
        if traced is None or target not in _tree.CASTABLE:
            return self.untouched(eqn, states, "cast from or to what is no float")
        if traced == target:
            return self.follow(eqn, states, self.chosen(eqn, states))
        if target in _tree.HALF:
            state = State(Kind.GRADIENT if self.in_backward(eqn) else Kind.LOW, target)
            return EqnPlan(
                eqn, OpClass.UNTOUCHED, f"cast to {target}", (None,), (state,)
            )
        if source is None or not source.is_low:
            return self.untouched(eqn, states, "cast to float32")
        if self.in_backward(eqn) or is_promotion(eqn):
            return self.follow(eqn, states, self.uncast(eqn, source))
        return self.full(eqn, states, "cast to float32 by the program", PINNED)

    def decided(self, eqn, states, decision: Decision) -> EqnPlan:
        if decision.dtype is None:
            if eqn.primitive.name == "convert_element_type":
                return self.decided_cast(eqn, states, decision)
            return self.untouched(eqn, states, decision.reason)
        entry = _registry.entry(eqn.primitive.name)
        if decision.dtype == FLOAT32:
            plan = self.full(eqn, states, decision.reason)
        elif entry.op_class is OpClass.UNTOUCHED:
            plan = self.operation(eqn, states)
        else:
            plan = self.compute(eqn, decision.reason, decision.dtype)
        return dataclasses.replace(plan, rule=decision.rule)

    def decided_cast(self, eqn, states, decision: Decision) -> EqnPlan:
        """A cast to half is how its operand is read: from an island in half."""
        plan = self.untouched(eqn, states, decision.reason)
        target = eqn.params["new_dtype"]
        if states[0] is not None and target in _tree.HALF:
            return dataclasses.replace(plan, in_dtypes=(target,))
        return plan

    def composite(self, eqn, states, call) -> EqnPlan | None:
        """A call without a matmul in it is planned like one operation."""
        contents = [self.planner.contents(body) for body in call.bodies(eqn)]
        if not call.is_composite or any(c.has_matmul for c in contents):
            return None
        if call.is_loop:
            if eqn.effects or self.planner.settings.rules:
                return None
            if any(c.has_half for c in contents):
                return self.untouched(eqn, states, "a loop that was written in half")
            return self.full(eqn, states, "a loop without a matmul in it")
        if not all(c.is_simple for c in contents):
            return None
        if not eqn.outvars:
            return self.untouched(eqn, states, "a call that returns nothing")
        if any(c.has_full for c in contents):
            return self.full(eqn, states, "a call of float32 operations")
        if any(c.has_lookup for c in contents) and self.is_lookup(eqn, states):
            return self.lookup(eqn)
        choice = self.chosen(eqn, states)
        return None if choice.state.is_low else self.follow(eqn, states, choice)

    # What an operation follows

    def chosen(self, eqn, states) -> "_Choice":
        choice = self.by_neighbours(eqn, states)
        if choice.state.is_low:
            bad = self.constants.unfit(eqn.invars, choice.state.dtype)
            if bad is not None:
                return _Choice(FULL, bad)
            if id(eqn) in self.sums and choice.state.kind is Kind.LOW:
                return _Choice(FULL, "part of a sum of many terms")
        return choice

    def by_neighbours(self, eqn, states) -> "_Choice":
        known = [
            s
            for v, s in zip(eqn.invars, states, strict=True)
            if s is not None and not is_literal(v)
        ]
        kinds = {s.kind for s in known}
        lows = [s for s in known if s.is_low]
        if kinds <= {Kind.NEUTRAL}:
            return _Choice(NEUTRAL, "float32 from outside")
        if all(castable_dtype(v) in (None, *_tree.HALF) for v in eqn.invars):
            dtype = lows[0].dtype if lows else self.planner.settings.compute_dtype
            return _Choice(State(Kind.LOW, dtype), "traced in half")
        if Kind.PINNED in kinds:
            state = KEPT if lows else PINNED
            return _Choice(state, "follows a cast to float32 by the program")
        if Kind.GRADIENT in kinds and not self.in_backward(eqn):
            return _Choice(KEPT, "a gradient is used: updates are made in float32")
        if Kind.KEPT in kinds:
            return _Choice(KEPT, "follows an update that is made in float32")
        if len({s.dtype for s in lows}) > 1:
            return _Choice(FULL, "operands of two half dtypes")
        state = lows[0] if lows else self.planner.low
        if Kind.GRADIENT in kinds:
            state = State(Kind.GRADIENT, state.dtype)
        wanted = any(v in self.wanted for v in eqn.outvars)
        if not any(map(castable_dtype, eqn.outvars)):
            wanted = Kind.FULL not in kinds and Kind.NEUTRAL not in kinds
        if Kind.FULL in kinds:
            if eqn.outvars[0] in self.rounded and self.planner.selects(eqn):
                return _Choice(state, "picks numbers that are rounded next")
            if wanted and eqn.primitive.name in _BARRIERS:
                return _Choice(state, "handed back in half under its name")
            if wanted and lows and not self.joins_island(eqn, states):
                return _Choice(state, "meets a low value outside the float32 island")
            return _Choice(FULL, "continues a float32 island")
        if wanted:
            return _Choice(state, "follows its low operands")
        return _Choice(FULL, "no matmul reads the result in half")

    def uncast(self, eqn, source: State) -> "_Choice":
        """What follows a cast to float32 that was not asked for.

        It was made for an operand of another dtype, or is the gradient of a cast.
        """
        if eqn.outvars[0] in self.wanted:
            return _Choice(source, "a promotion by JAX decides nothing")
        if self.in_backward(eqn):
            return _Choice(KEPT, "the gradient of a cast to half")
        return _Choice(FULL, "no matmul reads the result in half")

    def is_lookup(self, eqn, states) -> bool:
        """Rows looked up in a table of parameters are activations, from there on."""
        table = eqn.invars[0]
        return (
            not self.constants.is_constant(table)
            and all(s is None or s.kind is Kind.NEUTRAL for s in states)
            and castable_dtype(eqn.outvars[0]) == FLOAT32
            and eqn.outvars[0] in self.wanted
        )

    def lookup(self, eqn) -> EqnPlan:
        dtypes = tuple(map(castable_dtype, eqn.invars))
        outs = tuple(castable_dtype(v) and self.planner.low for v in eqn.outvars)
        reason = "a lookup in a float32 table"
        return EqnPlan(eqn, OpClass.FOLLOW, reason, dtypes, outs)

    def joins_island(self, eqn, states) -> bool:
        return eqn.primitive.name in _GATES or self.feeds.covers(eqn, states)


def _is_outer_product(eqn: Any) -> bool:
    """A contraction of no axis: `einsum("i,j->ij")` of positions and frequencies.

    In a backward pass it is the gradient of a weight that met one vector.
    """
    if eqn.primitive.name != "dot_general":
        return False
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return not contracted


class _Choice(NamedTuple):
    state: State
    reason: str
