"""Policies: which dtypes parameters, computation and outputs have."""

from jaxmp.policy._casts import cast_to_full, cast_to_half
from jaxmp.policy._grammar import get_policy
from jaxmp.policy._policy import Policy
from jaxmp.policy._policy import PolicyLike as PolicyLike
from jaxmp.policy._rules import PolicyRule
from jaxmp.policy.dtypes import half_dtype
from jaxmp.policy.rule_sets import (
    default_rules,
    first_and_last_in_half,
    head_in_float32,
    matmuls_in_half,
)

__all__ = [
    "Policy",
    "get_policy",
    "half_dtype",
    "cast_to_full",
    "cast_to_half",
    "PolicyRule",
    "default_rules",
    "head_in_float32",
    "matmuls_in_half",
    "first_and_last_in_half",
]
