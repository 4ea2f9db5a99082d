"""`cond` and `switch`: all branches agree on the dtype of each result."""

from collections.abc import Sequence
from typing import Any

from jaxmp._jaxpr.calls import branches, with_bodies
from jaxmp._jaxpr.types import Array, Eqn, Jaxpr
from jaxmp._jaxpr.versions import jaxpr_consts
from jaxmp.casting.plan.plan import Context, EqnPlan
from jaxmp.casting.plan.states import State, join
from jaxmp.casting.planner._interface import Planner
from jaxmp.casting.rules._call import CallRule, call_plan, fed, with_outputs
from jaxmp.casting.run._executor import Executor


class CondRule(CallRule):
    """Binds the same conditional with other branches."""

    primitives = ("cond",)

    def bodies(self, eqn: Eqn) -> list[Jaxpr]:
        return list(branches(eqn))

    def wants(
        self, eqn: Eqn, results: Sequence[bool], planner: Planner, context: Context
    ) -> Sequence[bool]:
        per_branch = [planner.wants(b, results, context).inputs for b in branches(eqn)]
        return (False, *(any(wants) for wants in zip(*per_branch, strict=True)))

    def plan(
        self,
        eqn: Eqn,
        states: Sequence[State | None],
        wants: Sequence[bool],
        planner: Planner,
        context: Context,
    ) -> EqnPlan:
        states = fed(states, self.wants(eqn, wants, planner, context), planner)
        plans = [
            planner.plan(body, states[1:], wants, context, jaxpr_consts(body))
            for body in branches(eqn)
        ]
        returned = zip(*(p.out_states for p in plans), strict=True)
        outs = [join(each, want) for each, want in zip(returned, wants, strict=True)]
        plans = tuple(with_outputs(p, outs) for p in plans)
        return call_plan(eqn, states, outs, plans)

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        planned = zip(plan.call, branches(plan.eqn), strict=True)
        bodies = [executor.closed(p, jaxpr_consts(held)) for p, held in planned]
        params = with_bodies(plan.eqn, *bodies)
        return plan.eqn.primitive.bind(*operands, **params)
