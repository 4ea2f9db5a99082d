"""What a program keeps from its forward pass for its backward pass."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.extend.core

from jaxmp._jaxpr import sources as _sources
from jaxmp._jaxpr.calls import bodies
from jaxmp._jaxpr.marks import scopes
from jaxmp._jaxpr.residuals import residual_jaxpr
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.report.audit._walk import Context


class Residual(NamedTuple):
    """An array that the forward pass computes and the backward pass reads.

    Attributes:
      dtype: its dtype.
      shape: its shape; of a loop, that of all iterations together.
      bytes: its size.
      source: the user's line that computes it.
      path: name scopes and modules around it.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    source: _sources.Source | None
    path: str


def residuals(jaxpr: Any) -> tuple[Residual, ...] | None:
    """Lists what is kept for the backward pass, the largest first.

    Args:
      jaxpr: a program. If it has a backward pass in it, what crosses over to that is
        listed; else what differentiating the program would keep.

    Returns:
      The residuals, without those that are arguments of the program, which are there
      anyway; in place of a cast or broadcast array, what it is made from. None if there
      is no backward pass and the program cannot be differentiated in reverse.
    """
    found = list(_crossing(jaxpr, Context()))
    if not found and not _has_backward(jaxpr):
        found = _of_derivative(jaxpr)
        if found is None:
            return None
    return tuple(sorted(found, key=lambda residual: -residual.bytes))


def _crossing(jaxpr: Any, context: Context) -> Iterator[Residual]:
    """What a backward equation reads of what an equation beside it computed."""
    makers: dict[Any, Any] = {}
    told = set()
    for eqn in open_jaxpr(jaxpr).eqns:
        inside = context.at(eqn)
        if not inside.in_backward:
            makers.update((v, eqn) for v in eqn.outvars)
            for body in bodies(eqn):
                yield from _crossing(body, inside)
            continue
        for v in eqn.invars:
            stored = _stored(v, makers)
            if stored in makers and stored not in told:
                told.add(stored)
                yield _residual(stored, makers[stored], context)


# XLA makes these again where they are read, and keeps what they are made of.
_REMADE = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "expand_dims",
        "reshape",
        "squeeze",
        "transpose",
    ]
)


def _stored(v: Any, makers: dict[Any, Any]) -> Any:
    """The variable that is kept so that `v` can be read; None for a constant."""
    while not hasattr(v, "val") and v in makers:
        eqn = makers[v]
        if eqn.primitive.name in ("jit", "pjit"):
            inside = open_jaxpr(eqn.params["jaxpr"])
            made = {w: e for e in inside.eqns for w in e.outvars}
            w = _stored(inside.outvars[eqn.outvars.index(v)], made)
            if w in made or w in inside.constvars:
                return v
            v = None if w is None else eqn.invars[inside.invars.index(w)]
            if v is None:
                return None
        elif eqn.primitive.name in _REMADE and _bytes(eqn.invars[0]) <= _bytes(v):
            v = eqn.invars[0]
        else:
            return v
    return None if hasattr(v, "val") else v


def _bytes(v: Any) -> int:
    return v.aval.size * getattr(v.aval.dtype, "itemsize", 0)


def _has_backward(jaxpr: Any) -> bool:
    return any(
        Context().at(eqn).in_backward or any(map(_has_backward, bodies(eqn)))
        for eqn in open_jaxpr(jaxpr).eqns
    )


def _of_derivative(jaxpr: Any) -> list[Residual] | None:
    avals = (v.aval for v in open_jaxpr(jaxpr).invars)
    args = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    derived = residual_jaxpr(jax.extend.core.jaxpr_as_fun(jaxpr), args, {})
    if derived is None:
        return None
    makers = {v: eqn for eqn in open_jaxpr(derived).eqns for v in eqn.outvars}
    kept = dict.fromkeys(_stored(v, makers) for v in open_jaxpr(derived).outvars)
    return [_residual(v, makers[v], Context()) for v in kept if v in makers]


def _residual(v: Any, eqn: Any, context: Context) -> Residual:
    site = Site(eqn.source_info.traceback, context.site)
    path = "/".join(context.path + scopes(eqn))
    return Residual(str(v.aval.dtype), v.aval.shape, _bytes(v), site.source, path)
