"""What a program keeps from its forward pass for its backward pass."""

from collections.abc import Iterator, Mapping

import jax
import jax.extend.core

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.calls import JITS, bodies, body
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.residuals import residual_jaxpr
from jaxmp._jaxpr.scopes import is_backward
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._jaxpr.walk import makers, walk
from jaxmp.report.audit.records import Residual


def residuals(jaxpr: Jaxpr) -> tuple[Residual, ...] | None:
    """Lists what is kept for the backward pass, the largest first.

    Args:
      jaxpr: a program. If it contains a backward pass, what crosses over to it is
        listed; otherwise what differentiating the program would keep.

    Returns:
      The residuals, without the arguments of the program, which are there anyway; in
      place of a cast or broadcast array, what it is made from. None if there is no
      backward pass and the program cannot be differentiated in reverse.
    """
    found: list[Residual] | None = list(_crossing(jaxpr, Site()))
    if not found and not any(map(is_backward, walk(jaxpr, bodies))):
        found = _of_derivative(jaxpr)
    if found is None:
        return None
    return tuple(sorted(found, key=lambda residual: -residual.bytes))


def _crossing(jaxpr: Jaxpr, around: Site) -> Iterator[Residual]:
    """What a backward equation reads of what an equation beside it computed."""
    made_by: dict[Var, Eqn] = {}
    seen = set()
    for eqn in open_jaxpr(jaxpr).eqns:
        site = Site(eqn, around)
        if not site.is_backward:
            made_by.update((v, eqn) for v in eqn.outvars)
            for inner in bodies(eqn):
                yield from _crossing(inner, site)
            continue
        for v in eqn.invars:
            stored = _stored(v, made_by)
            if stored in made_by and stored not in seen:
                seen.add(stored)
                yield _residual(stored, Site(made_by[stored], around))


# XLA makes these again where they are read, and keeps what they are made of.
_REMADE = frozenset(
    ["broadcast_in_dim", CAST, "expand_dims", "reshape", "squeeze", "transpose"]
)


def _stored(v: Atom, made_by: Mapping[Var, Eqn]) -> Var | None:
    """The variable that is kept so that `v` can be read; None for a constant."""
    while not is_literal(v) and v in made_by:
        eqn = made_by[v]
        if eqn.primitive.name in JITS:
            inside = open_jaxpr(body(eqn))
            made_inside = makers(inside)
            result = inside.outvars[eqn.outvars.index(v)]
            stored = _stored(result, made_inside)
            if stored is None:
                return None
            if stored in made_inside or stored in inside.constvars:
                return v
            v = eqn.invars[inside.invars.index(stored)]
        elif eqn.primitive.name in _REMADE and _bytes(eqn.invars[0]) <= _bytes(v):
            v = eqn.invars[0]
        else:
            return v
    return None if is_literal(v) else v


def _bytes(v: Atom) -> int:
    return v.aval.size * getattr(v.aval.dtype, "itemsize", 0)


def _of_derivative(jaxpr: Jaxpr) -> list[Residual] | None:
    avals = (v.aval for v in open_jaxpr(jaxpr).invars)
    args = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    derived = residual_jaxpr(jax.extend.core.jaxpr_as_fun(jaxpr), args, {})
    if derived is None:
        return None
    made_by = makers(derived)
    kept = dict.fromkeys(_stored(v, made_by) for v in open_jaxpr(derived).outvars)
    return [_residual(v, Site(made_by[v], Site())) for v in kept if v in made_by]


def _residual(v: Var, site: Site) -> Residual:
    return Residual(
        dtype=str(v.aval.dtype),
        shape=v.aval.shape,
        bytes=_bytes(v),
        source=site.source,
        path=site.path,
    )
