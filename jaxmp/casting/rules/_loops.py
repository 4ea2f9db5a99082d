"""`scan` and `while`: the dtype of each carry is a fixed point of the body.

Constants of a scan enter its body in float32 and are cast inside: their cotangents are
summed over the iterations, in the dtype in which they entered. XLA moves the cast out
of the loop.
"""

from collections.abc import Sequence
from typing import Any

from jaxmp._jaxpr.calls import loop, with_bodies
from jaxmp._jaxpr.types import Array, Eqn, Jaxpr
from jaxmp._jaxpr.versions import jaxpr_consts
from jaxmp.casting.plan.plan import Context, EqnPlan, JaxprPlan
from jaxmp.casting.plan.states import NEUTRAL, State, traced_state
from jaxmp.casting.planner._interface import Planner
from jaxmp.casting.rules._call import CallRule, call_plan, fed, with_outputs
from jaxmp.casting.rules._carries import entering, find_carries, released, settle
from jaxmp.casting.run._executor import Executor


class ScanRule(CallRule):
    """Binds the same scan with another body."""

    primitives = ("scan",)
    is_loop = True

    def bodies(self, eqn: Eqn) -> list[Jaxpr]:
        return [loop(eqn).body]

    def wants(
        self, eqn: Eqn, results: Sequence[bool], planner: Planner, context: Context
    ) -> Sequence[bool]:
        return find_carries(eqn, results, planner, context).inputs

    def plan(
        self,
        eqn: Eqn,
        states: Sequence[State | None],
        wants: Sequence[bool],
        planner: Planner,
        context: Context,
    ) -> EqnPlan:
        read = loop(eqn)
        carries = find_carries(eqn, wants, planner, context)
        _, consts, init, slices = read.split(fed(states, carries.inputs, planner))
        if not context.in_backward:
            consts = [
                NEUTRAL if s is not None and traced_state(v) is NEUTRAL else s
                for s, v in zip(consts, eqn.invars, strict=False)
            ]

        def plan_body(init: Sequence[State | None]) -> JaxprPlan:
            inputs = (*consts, *init, *slices)
            out_wants = (*carries.wants, *wants[read.carries :])
            closed = jaxpr_consts(read.body)
            return planner.plan(read.body, inputs, out_wants, carries.context, closed)

        init = entering(init, carries, read.carried(), planner)
        plan, init = settle(init, plan_body)
        others = [
            released(s, want, planner)
            for s, want in zip(
                plan.out_states[read.carries :], wants[read.carries :], strict=True
            )
        ]
        plan = with_outputs(plan, [*init, *others])
        outs = [*(released(s, False, planner) for s in init), *others]
        return call_plan(eqn, (*consts, *init, *slices), outs, plan)

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        consts = jaxpr_consts(loop(plan.eqn).body)
        params = with_bodies(plan.eqn, executor.closed(plan.call, consts))
        return plan.eqn.primitive.bind(*operands, **params)


class WhileRule(CallRule):
    """Binds the same loop with another condition and body, which agree on the carry."""

    primitives = ("while",)
    is_loop = True

    def bodies(self, eqn: Eqn) -> list[Jaxpr]:
        return [loop(eqn).condition, loop(eqn).body]

    def wants(
        self, eqn: Eqn, results: Sequence[bool], planner: Planner, context: Context
    ) -> Sequence[bool]:
        inputs = find_carries(eqn, results, planner, context).inputs
        return (*(False,) * loop(eqn).condition_consts, *inputs)

    def plan(
        self,
        eqn: Eqn,
        states: Sequence[State | None],
        wants: Sequence[bool],
        planner: Planner,
        context: Context,
    ) -> EqnPlan:
        read = loop(eqn)
        carries = find_carries(eqn, wants, planner, context)
        in_wants = (*(False,) * read.condition_consts, *carries.inputs)
        cond_consts, consts, init, _ = read.split(fed(states, in_wants, planner))

        def plan_body(init: Sequence[State | None]) -> JaxprPlan:
            inputs, closed = (*consts, *init), jaxpr_consts(read.body)
            out_wants = carries.wants
            return planner.plan(read.body, inputs, out_wants, carries.context, closed)

        init = entering(init, carries, eqn.outvars, planner)
        plan, init = settle(init, plan_body)
        closed = jaxpr_consts(read.condition)
        inputs = (*cond_consts, *init)
        condition = planner.plan(read.condition, inputs, (False,), context, closed)
        calls = (condition, with_outputs(plan, init))
        outs = [released(s, False, planner) for s in init]
        return call_plan(eqn, (*cond_consts, *consts, *init), outs, calls)

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        planned = zip(plan.call, self.bodies(plan.eqn), strict=True)
        bodies = [executor.closed(p, jaxpr_consts(held)) for p, held in planned]
        params = with_bodies(plan.eqn, *bodies)
        return plan.eqn.primitive.bind(*operands, **params)
