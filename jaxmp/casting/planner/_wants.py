"""The backward pass of a plan: which values of a jaxpr are wanted low."""

from collections.abc import Sequence

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.marks import is_in_layer
from jaxmp._jaxpr.primitives import CAST, LAYOUT
from jaxmp._jaxpr.types import Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.ops import _registry
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import Context
from jaxmp.casting.planner._intents import matmul_intent, selects
from jaxmp.casting.planner._interface import Planner, Wants


def find_wants(
    jaxpr: Jaxpr, out_wants: Sequence[bool], context: Context, planner: Planner
) -> Wants:
    """Reads the equations from the last to the first.

    Args:
      jaxpr: whose values are asked about.
      out_wants: which of its outputs are wanted low.
      context: of its equations.
      planner: knows the bodies of calls.
    """
    jaxpr = open_jaxpr(jaxpr)
    outs = zip(jaxpr.outvars, out_wants, strict=True)
    wanted = {v for v, want in outs if want and not is_literal(v)}
    rounded = set(wanted)
    for eqn in reversed(jaxpr.eqns):
        results = [v in wanted for v in eqn.outvars]
        wants = _operands(eqn, results, context, planner)
        found = zip(eqn.invars, wants, strict=True)
        operands = {v for v, want in found if want and not is_literal(v)}
        wanted |= operands
        if _rounds(eqn, rounded, planner):
            rounded |= operands
    inputs = tuple(v in wanted for v in jaxpr.invars)
    return Wants(inputs, frozenset(wanted), frozenset(rounded))


def _operands(
    eqn: Eqn, results: Sequence[bool], context: Context, planner: Planner
) -> Sequence[bool]:
    """Which operands of an equation are wanted low, given which results are."""
    nothing = (False,) * len(eqn.invars)
    if id(eqn) in context.updates or not any(map(castable_dtype, eqn.invars)):
        return nothing
    floats = tuple(castable_dtype(v) is not None for v in eqn.invars)
    name = eqn.primitive.name
    # A layer of Flax asks for half by its casts, which are read one by one.
    decided = None if is_in_layer(eqn) else planner.user.about(eqn, context)
    if decided is not None:
        return floats if decided.dtype in _tree.HALF else nothing
    call = _registry.call_rule(name)
    if call is not None:
        return call.wants(eqn, results, planner, planner.inside(eqn, context))
    if name == CAST:
        return (eqn.params["new_dtype"] in _tree.HALF or (results[0] and floats[0]),)
    op_class = _registry.entry(name).op_class
    if op_class is OpClass.COMPUTE:
        return floats if matmul_intent(eqn) is None else nothing
    return floats if op_class is OpClass.FOLLOW and any(results) else nothing


def _rounds(eqn: Eqn, rounded: set[Var], planner: Planner) -> bool:
    """Whether the operands that an equation wants low are rounded as they are."""
    name = eqn.primitive.name
    if _registry.call_rule(name) is None:
        passes_on = name in LAYOUT or name == CAST
        is_end = _registry.entry(name).op_class is OpClass.COMPUTE
    else:
        passes_on = False
        is_end = any(body.has_matmul for body in planner.contents.of_bodies(eqn))
    passes_on = passes_on or selects(eqn)
    return is_end or (passes_on and eqn.outvars[0] in rounded)
