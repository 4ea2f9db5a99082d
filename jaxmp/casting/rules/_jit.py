"""`jit` keeps its name, shardings, donation and inlining; other calls are inlined."""

from jaxmp.casting.rules._call import SingleBodyRule


class JitRule(SingleBodyRule):
    """Binds the same `jit` with another body: every other parameter stays."""

    primitives = ("jit", "pjit")

    def execute(self, plan, operands, executor):
        closed = executor.closed(plan.call, self.consts(plan))
        params = {**plan.eqn.params, self.body_name: closed}
        return plan.eqn.primitive.bind(*operands, **params)


class InlineRule(SingleBodyRule):
    """Calls that are no more than a grouping: their body is run in place."""

    primitives = ("closed_call", "core_call", "call", "eval_jaxpr")
    body_name = "call_jaxpr"

    def execute(self, plan, operands, executor):
        return executor.run(plan.call, self.consts(plan), operands)
