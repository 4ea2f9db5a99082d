"""Autocast: any JAX function in mixed precision, operation by operation."""

from jaxmp.casting._autocast import autocast, full_precision
from jaxmp.casting._explain import explain
from jaxmp.casting._explanation import Explanation
from jaxmp.casting._registry import register_rule
from jaxmp.casting._rules import OpRule
from jaxmp.casting.kernels.half_operands import half_operands

__all__ = [
    "Explanation",
    "OpRule",
    "autocast",
    "explain",
    "full_precision",
    "half_operands",
    "register_rule",
]
