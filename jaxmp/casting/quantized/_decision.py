"""Whether a matmul in half is multiplied in a smaller format, and why not."""

import dataclasses
from typing import Any

from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.marks import (
    OWN_MATMUL_SCOPE,
    decided_elsewhere,
    is_marked_to_quantize,
    quantize_mark,
    scopes,
)
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.scopes import layer_path
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.walk import walk
from jaxmp._tree import HALF
from jaxmp.casting.plan.plan import Context, EqnPlan, Quantizing, Settings
from jaxmp.casting.planner._interface import Planner
from jaxmp.casting.quantized._roles import (
    BOTH_ACTIVATIONS,
    OWN_DERIVATIVE,
    MatmulRoles,
)
from jaxmp.policy.blocks import is_in
from jaxmp.policy.quantize import NOT_QUANTIZED
from jaxmp.quantization.recipe import ACTIVATION, recipe_of

_MULTIPLE = 16
"""cuBLASLt multiplies float8 in units of 16 numbers ("cuBLAS library", 8-bit floating
point data types); XLA would pad every operand to them."""

_UNKNOWN = MatmulRoles((ACTIVATION, ACTIVATION), OWN_DERIVATIVE)


def quantizes(settings: Settings, jaxpr: Jaxpr) -> bool:
    """Whether a policy, a rule or a layer asks for a smaller format."""
    if settings.quantize is not None or any(r.quantize for r in settings.rules):
        return True
    return any(map(is_marked_to_quantize, walk(jaxpr)))


def quantizing(plan: EqnPlan, planner: Planner, context: Context) -> EqnPlan:
    """The plan of an equation, with what is decided about its format.

    Nothing is decided about what is no matmul in half, or was decided by an autocast
    inside.
    """
    eqn = plan.eqn
    if not planner.matmuls or eqn.primitive.name not in MATMULS:
        return plan
    dtypes = set(plan.in_dtypes[:2])
    if len(dtypes) != 1 or not dtypes <= HALF or decided_elsewhere(eqn):
        return plan
    found = planner.matmuls.get(id(eqn), _UNKNOWN)
    decision = _decide(eqn, found, planner, context)
    return dataclasses.replace(plan, quantizing=decision)


def _decide(
    eqn: Eqn, found: MatmulRoles, planner: Planner, context: Context
) -> Quantizing:
    name, who = planner.settings.quantize, ""
    mark = quantize_mark(eqn, context.quantize)
    if mark == OWN_MATMUL_SCOPE:
        return Quantizing(None, found.roles, "a matmul of the layer's author")
    if mark is not None:
        name, who = mark, "a rule"
    rule = planner.user.quantization(eqn, context)
    if rule is not None:
        name, who = rule.quantize or NOT_QUANTIZED, "a rule"
    elif is_in(layer_path(context.scopes + scopes(eqn)), planner.half_blocks):
        name, who = NOT_QUANTIZED, "one of the first or last blocks"
    if name in (None, NOT_QUANTIZED):
        return Quantizing(None, found.roles, who or "nothing asks for another format")
    reason = _impossible(eqn, found) or ("" if who else _unwise(eqn, found))
    if reason:
        return Quantizing(None, found.roles, reason)
    recipe = recipe_of(name)
    if recipe.leaves_in_half(found.roles):
        return Quantizing(None, found.roles, f"{name} leaves gradients of weights")
    return Quantizing(recipe, found.roles, f"{name}: {recipe}")


def _impossible(eqn: Eqn, found: MatmulRoles) -> str:
    """Why a matmul can have no other format, whoever asks for it."""
    if eqn.primitive.name != "dot_general":
        is_ragged = eqn.primitive.name.startswith("ragged")
        return "a ragged matmul" if is_ragged else "a convolution"
    if _is_divided(eqn.params.get("out_sharding")):
        return "it says how its result is divided: out_sharding="
    reasons = (BOTH_ACTIVATIONS, OWN_DERIVATIVE)
    return found.reason if found.reason in reasons else ""


def _is_divided(sharding: Any) -> bool:
    """Whether a sharding, of JAX's explicit kind, divides an array."""
    return any(axis is not None for axis in getattr(sharding, "spec", None) or ())


def _unwise(eqn: Eqn, found: MatmulRoles) -> str:
    """Why a matmul is left in half unless a rule asks for another format."""
    shape = matmul_shape(eqn)
    _, batch = eqn.params["dimension_numbers"]
    if batch[0]:
        return f"a batch of {shape.batch} matmuls"
    if found.reason:
        return found.reason
    for axis, size in (("M", shape.m), ("K", shape.k), ("N", shape.n)):
        if size % _MULTIPLE or not size:
            return f"{axis}={size} is no multiple of {_MULTIPLE}"
    return ""
