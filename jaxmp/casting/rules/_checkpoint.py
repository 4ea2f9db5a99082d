"""`jax.checkpoint`: the region, its policy and `prevent_cse` stay.

What enters the region is saved as it enters, so the casts of float32 values to half are
inside the region, and those of islands' results outside it.
"""

from collections.abc import Sequence
from typing import Any

from jaxmp._jaxpr.calls import CHECKPOINTS, with_bodies
from jaxmp._jaxpr.types import Array
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.rules._call import SingleBodyRule
from jaxmp.casting.run._executor import Executor


class CheckpointRule(SingleBodyRule):
    """Binds the same region with another body."""

    primitives = CHECKPOINTS
    is_composite = False

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        closed = executor.closed(plan.call, ())
        params = with_bodies(plan.eqn, open_jaxpr(closed))
        return plan.eqn.primitive.bind(*operands, **params)
