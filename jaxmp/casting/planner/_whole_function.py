"""A whole function planned: what its plan depends on, and the states of its inputs."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.types import Jaxpr
from jaxmp.casting.ops._user_rules import read_rules
from jaxmp.casting.plan.plan import JaxprPlan, Settings
from jaxmp.casting.plan.states import FLOAT32, traced_state, weight
from jaxmp.casting.planner._ambient_precision import ambient_precision
from jaxmp.casting.planner._planner import JaxprPlanner
from jaxmp.casting.planner._returned_states import returned_states
from jaxmp.casting.planner._weight_gradients import weight_gradients
from jaxmp.casting.quantized._blocks import half_blocks
from jaxmp.casting.quantized._decision import quantizes
from jaxmp.casting.quantized._roles import roles_of
from jaxmp.errors import AutocastError, AutocastRuleError
from jaxmp.policy import PolicyLike, get_policy
from jaxmp.policy.reduce_dtype import is_wider
from jaxmp.policy.rule_sets import half_blocks_in


def read_settings(
    policy: PolicyLike, rules: Sequence[Any], half_residuals: bool
) -> Settings:
    """Reads what a plan depends on from the arguments of `autocast`."""
    policy = get_policy(policy)
    dtype = jnp.dtype(policy.compute_dtype)
    if dtype not in _tree.CASTABLE:
        raise AutocastError(
            f"autocast computes in bfloat16, float16 or float32, not in {dtype}, which "
            f"the policy {str(policy)!r} names. Write autocast(fn, 'mixed_bfloat16')."
        )
    half_blocks = half_blocks_in(rules)
    rules = read_rules(rules)
    for rule in rules:
        if rule.carry not in (None, FLOAT32, dtype):
            raise AutocastRuleError(
                f"{rule} carries in {rule.carry}, but {str(policy)!r} computes in "
                f"{dtype}. Write carry='{dtype}' or carry='float32'."
            )
    return Settings(
        dtype,
        policy.lax_precision,
        rules,
        half_residuals,
        wide_gradients=is_wider(policy.reduce_dtype, dtype),
        quantize=policy.quantize,
        half_blocks=half_blocks,
    )


def plan_jaxpr(
    jaxpr: Jaxpr, settings: Settings, output_dtype: Any = None
) -> tuple[JaxprPlan, JaxprPlanner]:
    """Plans a whole traced function, whose inputs have the dtypes they came in.

    It was traced under `without_ambient_precision()`; what stays in float32 gets the
    precision that is ambient now.
    """
    planner = JaxprPlanner(settings._replace(ambient=ambient_precision()))
    in_states = [traced_state(v) for v in jaxpr.jaxpr.invars]
    if settings.wide_gradients:
        in_states = [weight(s.dtype) if s and s.is_low else s for s in in_states]
    if settings.wide_gradients:
        planner.weight_gradients = weight_gradients(jaxpr)
    if quantizes(settings, jaxpr):
        planner.matmuls = roles_of(jaxpr, weight_gradients(jaxpr))
        if settings.half_blocks:
            planner.half_blocks = half_blocks(jaxpr, settings.half_blocks)
    is_half = output_dtype is not None and jnp.dtype(output_dtype) in _tree.HALF
    out_wants = [is_half and castable_dtype(v) is not None for v in jaxpr.jaxpr.outvars]
    if not (settings.is_plain or settings.as_written):
        in_states = returned_states(planner, jaxpr, in_states, out_wants)
    plan = planner.plan(jaxpr, in_states, out_wants, consts=jaxpr.consts)
    return plan, planner


def check_rules(planner: JaxprPlanner) -> None:
    """Raises if a rule of the user's matched no operation."""
    for rule in planner.settings.rules:
        if not rule.allow_unused and rule not in planner.user.used:
            raise AutocastRuleError(
                f"{rule} matches no operation. jaxmp.explain(fn, policy)(*args) lists "
                "the primitives, paths and functions there are; allow_unused=True "
                "permits it."
            )
