"""`jit` keeps its name, shardings, donation and inlining; other calls are inlined."""

from collections.abc import Sequence
from typing import Any

from jaxmp._jaxpr.calls import GROUPINGS, JITS, with_bodies
from jaxmp._jaxpr.types import Array
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.rules._call import SingleBodyRule
from jaxmp.casting.run._executor import Executor


class JitRule(SingleBodyRule):
    """Binds the same `jit` with another body: every other parameter stays."""

    primitives = JITS

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        closed = executor.closed(plan.call, self.consts(plan))
        params = with_bodies(plan.eqn, closed)
        return plan.eqn.primitive.bind(*operands, **params)


class InlineRule(SingleBodyRule):
    """Calls that only group equations: their body is run in place."""

    primitives = GROUPINGS

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        return executor.run(plan.call, self.consts(plan), operands)
