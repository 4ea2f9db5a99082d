"""Policies: what dtype parameters, computation and outputs have."""

from jaxmp.policy._casts import cast_to_full, cast_to_half
from jaxmp.policy._grammar import get_policy, presets
from jaxmp.policy._policy import Policy
from jaxmp.policy._rules import PolicyRule
from jaxmp.policy.dtypes import (
    dtype_to_names,
    half_dtype,
    name_to_dtype,
    policy_name_for,
)
from jaxmp.policy.rule_sets import (
    default_rules,
    head_in_float32,
    matmuls_in_half,
    norms_in_float32,
)

__all__ = [
    "Policy",
    "get_policy",
    "presets",
    "policy_name_for",
    "half_dtype",
    "cast_to_full",
    "cast_to_half",
    "dtype_to_names",
    "name_to_dtype",
    "PolicyRule",
    "default_rules",
    "norms_in_float32",
    "head_in_float32",
    "matmuls_in_half",
]
