"""bfloat16 in place of another format: it has the range of float32, and arithmetic.

A format without arithmetic, such as float8, is emulated: the function runs under
bfloat16, and every bfloat16 result is rounded to the format. That is a cast:
`lax.reduce_precision` turns subnormal numbers into zero. Rounded twice, such results
are a few per cent farther off than with one rounding.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.execution import bind
from jaxmp._jaxpr.types import Array, Arrays
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.policy import Policy


def stand_in(policy: Policy) -> Policy:
    """The policy with bfloat16 for its compute dtype."""
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


class Rounding(Interpreter):
    """Rounds every bfloat16 result to a format, if there is one."""

    def __init__(self, emulated: np.dtype | None):
        super().__init__()
        self.emulated = emulated

    def equation(self, site: ReplaySite, operands: Arrays) -> list[Array]:
        results = bind(site.eqn, operands)
        if self.emulated is not None:
            results = [_rounded(x, self.emulated) for x in results]
        self.observe(site, operands, results)
        return results


def _rounded(x: Array, dtype: np.dtype) -> Array:
    is_bfloat16 = _tree.is_array(x) and x.dtype == jnp.bfloat16
    return x.astype(dtype).astype(jnp.bfloat16) if is_bfloat16 else x
