"""How calls are planned and run: one file per kind of primitive that holds jaxprs."""

from jaxmp.casting.ops import _registry
from jaxmp.casting.rules._branches import CondRule
from jaxmp.casting.rules._checkpoint import CheckpointRule
from jaxmp.casting.rules._custom_derivatives import CustomJVPRule, CustomVJPRule
from jaxmp.casting.rules._jit import InlineRule, JitRule
from jaxmp.casting.rules._loops import ScanRule, WhileRule
from jaxmp.casting.rules._shard_map import ShardMapRule

for _rule in (
    JitRule(),
    InlineRule(),
    CheckpointRule(),
    CustomJVPRule(),
    CustomVJPRule(),
    ScanRule(),
    WhileRule(),
    CondRule(),
    ShardMapRule(),
):
    _registry.add_call_rule(_rule)
