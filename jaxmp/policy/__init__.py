"""Policies: what dtype parameters, computation and outputs have."""

from jaxmp.policy._casts import cast_to_full, cast_to_half
from jaxmp.policy._dtypes import (
    dtype_to_names,
    half_dtype,
    name_to_dtype,
    policy_name_for,
)
from jaxmp.policy._grammar import get_policy, presets
from jaxmp.policy._policy import Policy

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
]
