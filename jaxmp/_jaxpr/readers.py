"""Which dtype the readers of a value want it in."""

from typing import Any

import jax.numpy as jnp

from jaxmp._jaxpr.calls import LOOPS, body, branches, loop
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr

_MOVES = frozenset(
    (
        "broadcast_in_dim",
        "copy",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "reshape",
        "rev",
        "sharding_constraint",
        "slice",
        "squeeze",
        "transpose",
    )
)
"""Operations that move the values of their first operand and compute nothing."""


def only_dtype_read(jaxpr: Jaxpr, variable: Any) -> Any:
    """The one dtype that every reader of a variable casts it to.

    Args:
      jaxpr: the program; calls in it are entered.
      variable: an input of it.

    Returns:
      A dtype, or None if a reader takes the value as it is, if dtypes differ, or if
      nothing reads it.
    """
    found = _dtypes_read(open_jaxpr(jaxpr), variable)
    return found.pop() if len(found) == 1 else None


def _dtypes_read(jaxpr: Any, variable: Any) -> set[Any]:
    """The dtypes that it is cast to, with None for a reader without a cast."""
    found: set[Any] = {None} if any(v is variable for v in jaxpr.outvars) else set()
    for eqn in jaxpr.eqns:
        for place, operand in enumerate(eqn.invars):
            if operand is not variable:
                continue
            if eqn.primitive.name == "optimization_barrier":
                found |= _dtypes_read(jaxpr, eqn.outvars[place])
            elif eqn.primitive.name in _MOVES and place == 0:
                found |= _dtypes_read(jaxpr, eqn.outvars[0])
            else:
                found |= _dtypes_read_by(eqn, place)
    return found


def _dtypes_read_by(eqn: Eqn, place: int) -> set[Any]:
    name = eqn.primitive.name
    if name == "convert_element_type":
        return {jnp.dtype(eqn.params["new_dtype"])}
    inner: list[tuple[Any, int]] = []
    if name == "scan":
        read = loop(eqn)
        if place not in read.split(range(len(eqn.invars)))[2]:  # not a carry
            inner = [(read.body, place)]
    elif name == "cond":
        inner = [(branch, place - 1) for branch in branches(eqn) if place > 0]
    elif name not in LOOPS and (called := body(eqn)) is not None:
        inner = [(called, place)]
    if not inner:
        return {None}
    opened = [(open_jaxpr(jaxpr), i) for jaxpr, i in inner]
    return set().union(*(_dtypes_read(j, j.invars[i]) for j, i in opened))
