"""What the bodies of calls are made of, which decides whether they are bound whole."""

from typing import Any, NamedTuple

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.marks import (
    AUTOCAST_SCOPE,
    FULL_PRECISION_SCOPE,
    is_in_layer,
    is_on_half_operands,
)
from jaxmp._jaxpr.scopes import scope_names
from jaxmp.casting.ops import _registry
from jaxmp.casting.ops._op_lists import OpClass


class Contents(NamedTuple):
    """What the equations of a jaxpr are, those of the bodies of its calls included."""

    has_float: bool = False
    has_matmul: bool = False
    has_full: bool = False
    has_lookup: bool = False
    has_half: bool = False
    is_simple: bool = True
    """No loop, no effect, no half dtype, no rule and no unknown primitive: in float32
    it can be bound whole, and computed again where that saves memory."""
    is_special: bool = False
    """All of it is part of special functions."""
    on_half_operands: Any = None
    """The first equation of a function that was traced on half operands."""


def contents_of(planner: Any, jaxpr: Any) -> Contents:
    """Summarises a jaxpr, given a planner that knows the bodies of its calls."""
    has_float = any(map(castable_dtype, [*jaxpr.invars, *jaxpr.outvars]))
    has_matmul = has_full = has_lookup = has_half = False
    is_simple = not planner.settings.rules and not jaxpr.effects
    on_half = None
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        dtypes = [castable_dtype(v) for v in (*eqn.invars, *eqn.outvars)]
        call = _registry.call_rule(name)
        has_float = has_float or any(dtypes)
        has_half = has_half or any(dtype in _tree.HALF for dtype in dtypes)
        names = scope_names(eqn)
        if is_on_half_operands(eqn):
            on_half = on_half or eqn
        is_decided = AUTOCAST_SCOPE in names or is_in_layer(eqn)
        if any(dtype in _tree.HALF for dtype in dtypes) or is_decided:
            is_simple = False
        if call is not None:
            inner = [planner.contents(body) for body in call.bodies(eqn)]
            on_half = next((c.on_half_operands for c in inner), None) or on_half
            has_float = has_float or any(c.has_float for c in inner)
            has_matmul = has_matmul or any(c.has_matmul for c in inner)
            has_full = has_full or any(c.has_full for c in inner)
            has_lookup = has_lookup or any(c.has_lookup for c in inner)
            has_half = has_half or any(c.has_half for c in inner)
            if call.is_loop or not all(c.is_simple for c in inner):
                is_simple = is_simple and not any(c.has_float for c in inner)
            has_full = has_full or (call.is_loop and any(c.has_float for c in inner))
            continue
        entry = _registry.entry(name)
        if FULL_PRECISION_SCOPE in names:
            has_full = True
        elif entry.op_class is OpClass.COMPUTE:
            has_matmul = has_matmul or any(dtypes)
        elif entry.op_class is OpClass.FULL:
            has_full = has_full or any(dtypes)
        has_lookup = has_lookup or (name == "gather" and dtypes[0] is not None)
        is_simple = is_simple and _registry.is_cheap(name)
    is_special = bool(jaxpr.eqns) and all(map(planner.is_special, jaxpr.eqns))
    return Contents(
        has_float,
        has_matmul,
        has_full,
        has_lookup,
        has_half,
        is_simple,
        is_special,
        on_half,
    )


def is_cheap(planner: Any, eqn: Any) -> bool:
    """Tells whether an equation may be computed again to save memory."""
    call = _registry.call_rule(eqn.primitive.name)
    if call is None:
        return _registry.is_cheap(eqn.primitive.name)
    return not call.is_loop and all(
        planner.contents(body).is_simple for body in call.bodies(eqn)
    )
