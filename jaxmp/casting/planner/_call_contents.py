"""What the bodies of calls are made of, which decides whether they are bound whole."""

import functools
from typing import NamedTuple

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.jax_functions import is_in_special_function
from jaxmp._jaxpr.marks import (
    AUTOCAST_SCOPE,
    FULL_PRECISION_SCOPE,
    is_in_layer,
    is_on_half_operands,
)
from jaxmp._jaxpr.scopes import scope_names
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
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
    on_half_operands: Eqn = None
    """The first equation of a function that was traced on half operands."""


class CallContents:
    """The contents of jaxprs, each of which is read once.

    Args:
      has_rules: whether the user has rules, which look at single equations.
    """

    def __init__(self, has_rules: bool):
        self._has_rules = has_rules
        # Keyed by id; the jaxpr beside it is kept from being collected meanwhile.
        self._known: dict[int, tuple[Contents, Jaxpr]] = {}

    def of(self, jaxpr: Jaxpr) -> Contents:
        """Summarises a jaxpr."""
        jaxpr = open_jaxpr(jaxpr)
        if id(jaxpr) not in self._known:
            self._known[id(jaxpr)] = self._read(jaxpr), jaxpr
        return self._known[id(jaxpr)][0]

    def of_bodies(self, eqn: Eqn) -> list[Contents]:
        """Summarises each body of a call; there are none in other equations."""
        call = _registry.call_rule(eqn.primitive.name)
        return [] if call is None else [self.of(body) for body in call.bodies(eqn)]

    def is_special(self, eqn: Eqn) -> bool:
        """Whether an equation is part of a special function, or calls one."""
        bodies = self.of_bodies(eqn)
        is_call = bool(bodies) and all(body.is_special for body in bodies)
        return is_call or is_in_special_function(eqn)

    def is_cheap(self, eqn: Eqn) -> bool:
        """Whether an equation may be computed again to save memory."""
        call = _registry.call_rule(eqn.primitive.name)
        if call is None:
            return _registry.is_cheap(eqn.primitive.name)
        return not call.is_loop and all(x.is_simple for x in self.of_bodies(eqn))

    def _read(self, jaxpr: Jaxpr) -> Contents:
        own = Contents(
            has_float=any(map(castable_dtype, (*jaxpr.invars, *jaxpr.outvars))),
            is_simple=not self._has_rules and not jaxpr.effects,
        )
        found = functools.reduce(_union, map(self._of_equation, jaxpr.eqns), own)
        is_special = bool(jaxpr.eqns) and all(map(self.is_special, jaxpr.eqns))
        return found._replace(is_special=is_special)

    def _of_equation(self, eqn: Eqn) -> Contents:
        dtypes = [castable_dtype(v) for v in (*eqn.invars, *eqn.outvars)]
        has_half = any(dtype in _tree.HALF for dtype in dtypes)
        is_decided = AUTOCAST_SCOPE in scope_names(eqn) or is_in_layer(eqn)
        own = Contents(
            has_float=any(dtypes),
            has_half=has_half,
            is_simple=not has_half and not is_decided,
            on_half_operands=eqn if is_on_half_operands(eqn) else None,
        )
        call = _registry.call_rule(eqn.primitive.name)
        inside = _of_operation(eqn) if call is None else self._of_call(eqn)
        return _union(own, inside)

    def _of_call(self, eqn: Eqn) -> Contents:
        is_loop = _registry.call_rule(eqn.primitive.name).is_loop
        bodies = functools.reduce(_union, self.of_bodies(eqn), Contents())
        is_simple = bodies.is_simple and not is_loop
        return bodies._replace(
            has_full=bodies.has_full or (is_loop and bodies.has_float),
            is_simple=is_simple or not bodies.has_float,
        )


def _of_operation(eqn: Eqn) -> Contents:
    """The contents of an equation that is not a call, its half dtypes aside."""
    name = eqn.primitive.name
    has_float = any(map(castable_dtype, (*eqn.invars, *eqn.outvars)))
    op_class = _registry.entry(name).op_class
    is_marked = FULL_PRECISION_SCOPE in scope_names(eqn)
    return Contents(
        has_matmul=op_class is OpClass.COMPUTE and has_float and not is_marked,
        has_full=is_marked or (op_class is OpClass.FULL and has_float),
        has_lookup=name == "gather" and castable_dtype(eqn.invars[0]) is not None,
        is_simple=_registry.is_cheap(name),
    )


def _union(a: Contents, b: Contents) -> Contents:
    return Contents(
        has_float=a.has_float or b.has_float,
        has_matmul=a.has_matmul or b.has_matmul,
        has_full=a.has_full or b.has_full,
        has_lookup=a.has_lookup or b.has_lookup,
        has_half=a.has_half or b.has_half,
        is_simple=a.is_simple and b.is_simple,
        on_half_operands=a.on_half_operands or b.on_half_operands,
    )
