"""Which dtype the readers of a value want it in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

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


def only_dtypes_read(jaxpr: Jaxpr, variables: Sequence[Any]) -> list[Any]:
    """For each of some inputs, the one dtype that every reader casts it to.

    Args:
      jaxpr: the program; calls in it are entered. What nothing needs does not read.
      variables: inputs of it.

    Returns:
      A dtype for each, or None if a reader takes the value as it is, if dtypes differ,
      or if nothing reads it.
    """
    opened = open_jaxpr(jaxpr)
    needed, _ = partial_eval.dce_jaxpr(opened, [True] * len(opened.outvars), True)
    found = [_reads(needed, variable) for variable in variables]
    dtypes = [{None} if read.returned else read.dtypes for read in found]
    return [next(iter(one)) if len(one) == 1 else None for one in dtypes]


class _Reads(NamedTuple):
    """What becomes of a variable.

    Attributes:
      dtypes: that it is cast to, with None for a reader without a cast.
      returned: the results of the jaxpr that it is moved to.
    """

    dtypes: set[Any]
    returned: set[int]


def _reads(jaxpr: Any, variable: Any) -> _Reads:
    dtypes: set[Any] = set()
    returned = {i for i, v in enumerate(jaxpr.outvars) if v is variable}
    for eqn in jaxpr.eqns:
        for place, operand in enumerate(eqn.invars):
            if operand is variable:
                read, moved = _read_by(eqn, place)
                dtypes |= read
                for v in moved:
                    beyond = _reads(jaxpr, v)
                    dtypes |= beyond.dtypes
                    returned |= beyond.returned
    return _Reads(dtypes, returned)


def _read_by(eqn: Eqn, place: int) -> tuple[set[Any], list[Any]]:
    """The dtypes that an equation casts an operand to, and the results it moves it to.

    Results of loops and branches count as readers without a cast.
    """
    name = eqn.primitive.name
    if name == "convert_element_type":
        return {jnp.dtype(eqn.params["new_dtype"])}, []
    if name == "optimization_barrier":
        return set(), [eqn.outvars[place]]
    if name in _MOVES:
        return (set(), list(eqn.outvars)) if place == 0 else ({None}, [])
    called = None if name in LOOPS else _called(eqn)
    if called is not None:
        opened = open_jaxpr(called)
        read = _reads(opened, opened.invars[place])
        return read.dtypes, [eqn.outvars[i] for i in read.returned]
    inner: list[tuple[Any, int]] = []
    if name == "scan":
        split = loop(eqn)
        if place not in split.split(range(len(eqn.invars)))[2]:  # not a carry
            inner = [(split.body, place)]
    elif name == "cond":
        inner = [(branch, place - 1) for branch in branches(eqn) if place > 0]
    if not inner:
        return {None}, []
    opened = [(open_jaxpr(jaxpr), i) for jaxpr, i in inner]
    found = [_reads(jaxpr, jaxpr.invars[i]) for jaxpr, i in opened]
    dtypes = set().union(*(read.dtypes for read in found))
    return (dtypes | {None} if any(read.returned for read in found) else dtypes), []


def _called(eqn: Eqn) -> Jaxpr | None:
    """The body of a call; of two ways to do it, the one for several devices."""
    for_many = eqn.params.get("many")
    if for_many is None:
        return body(eqn)
    return jax.make_jaxpr(for_many)(*(v.aval for v in eqn.invars))
