"""`cond` and `switch`: all branches agree on the dtype of each result."""

from jaxmp._jaxpr.versions import jaxpr_consts
from jaxmp.casting.plan._states import join
from jaxmp.casting.rules._call import CallRule, call_plan, fed, with_outputs


class CondRule(CallRule):
    """Binds the same conditional with other branches."""

    primitives = ("cond",)

    def bodies(self, eqn):
        return list(eqn.params["branches"])

    def wants(self, eqn, results, planner, context):
        per_branch = [planner.wants(b, results, context) for b in self.bodies(eqn)]
        return (False, *(any(wants) for wants in zip(*per_branch, strict=True)))

    def plan(self, eqn, states, wants, planner, context):
        in_wants = self.wants(eqn, wants, planner, context)
        states = [
            fed(s, want, planner) for s, want in zip(states, in_wants, strict=True)
        ]
        plans = [
            planner.plan(body, states[1:], wants, context, jaxpr_consts(body))
            for body in self.bodies(eqn)
        ]
        outs = [
            join(branch_states, want)
            for branch_states, want in zip(
                zip(*(p.out_states for p in plans), strict=True), wants, strict=True
            )
        ]
        plans = tuple(with_outputs(p, outs) for p in plans)
        return call_plan(eqn, states, outs, plans)

    def execute(self, plan, operands, executor):
        branches = tuple(
            executor.closed(branch, jaxpr_consts(body))
            for branch, body in zip(plan.call, self.bodies(plan.eqn), strict=True)
        )
        params = {**plan.eqn.params, "branches": branches}
        return plan.eqn.primitive.bind(*operands, **params)
