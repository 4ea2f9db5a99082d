"""bfloat16 in place of another half dtype: it has the range of float32."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.policy import Policy


def stand_in(policy: Policy) -> Policy:
    """The policy with bfloat16 for its compute dtype, and nothing smaller."""
    return Policy(
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
        matmul_precision=policy.matmul_precision,
        reduce_dtype=jnp.float32 if policy.reduce_dtype == jnp.float32 else None,
    )


def stand_in_rules(rules: Sequence[Any]) -> list[Any]:
    """Rules of autocast with bfloat16 for every half dtype."""
    return [
        dataclasses.replace(rule, compute=jnp.bfloat16)
        if getattr(rule, "compute", None) in _tree.HALF
        else rule
        for rule in rules
    ]
