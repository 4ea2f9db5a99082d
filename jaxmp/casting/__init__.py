"""Autocast: any JAX function in mixed precision, operation by operation."""

from jaxmp.casting._autocast import autocast, full_precision
from jaxmp.casting.explanation._explain import explain
from jaxmp.casting.explanation._result import Explanation
from jaxmp.casting.kernels.half_operands import half_operands
from jaxmp.casting.ops._registry import register_rule
from jaxmp.casting.ops._user_rules import OpRule

__all__ = [
    "Explanation",
    "OpRule",
    "autocast",
    "explain",
    "full_precision",
    "half_operands",
    "register_rule",
]
