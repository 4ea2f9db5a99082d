"""`shard_map`: the same mesh and specs around another body."""

import jax

from jaxmp._jaxpr.versions import shard_map_arguments
from jaxmp.casting.rules._call import SingleBodyRule


class ShardMapRule(SingleBodyRule):
    """Calls `jax.shard_map` again, on a function that runs the plan of the body."""

    primitives = ("shard_map",)
    is_composite = False

    def execute(self, plan, operands, executor):
        def body(*args):
            return tuple(executor.run(plan.call, (), args))

        return jax.shard_map(body, **shard_map_arguments(plan.eqn.params))(*operands)
