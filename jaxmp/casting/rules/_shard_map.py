"""`shard_map`: the same mesh and specs around another body."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxmp._jaxpr.types import Array
from jaxmp._jaxpr.versions import shard_map_arguments
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.rules._call import SingleBodyRule
from jaxmp.casting.run._executor import Executor


class ShardMapRule(SingleBodyRule):
    """Calls `jax.shard_map` again, on a function that runs the plan of the body."""

    primitives = ("shard_map",)
    is_composite = False

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        def body(*args: Array) -> tuple[Array, ...]:
            return tuple(executor.run(plan.call, (), args))

        return jax.shard_map(body, **shard_map_arguments(plan.eqn.params))(*operands)
