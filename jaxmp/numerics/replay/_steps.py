"""`Steps`: a jaxpr made ready to be run, equation by equation."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.versions import jaxpr_consts, open_jaxpr


class Steps:
    """The equations of a jaxpr, what they are for, and when values are done.

    Attributes:
      eqns: all equations.
      needed: for each, which of its results the value of the function needs.
      is_later: for each, whether only gradients need it.
      done: for each, the variables that nothing reads after it.
    """

    def __init__(self, jaxpr: Any, needed: tuple[bool, ...]):
        self.jaxpr = jaxpr  # whose id is the key of this object: kept alive
        self.consts = [jnp.asarray(x) for x in jaxpr_consts(jaxpr)]
        opened = open_jaxpr(jaxpr)
        self.constvars, self.invars = opened.constvars, opened.invars
        self.outvars, self.eqns = opened.outvars, opened.eqns
        later = set(_variables(self.outvars))
        of_value = set(_variables(itertools.compress(self.outvars, needed)))
        live = set(later)
        rows: list[tuple[Any, bool, set[Any]]] = []
        for eqn in reversed(self.eqns):
            inputs = set(_variables(eqn.invars))
            of_results = tuple(v in of_value for v in eqn.outvars)
            is_live = not live.isdisjoint(eqn.outvars)
            used = inputs.union(eqn.outvars)
            rows.append((of_results, is_live and not any(of_results), used - later))
            later |= used
            of_value |= inputs if any(of_results) else set()
            live |= inputs if is_live else set()
        rows.reverse()
        self.needed = [row[0] for row in rows]
        self.is_later = [row[1] for row in rows]
        self.done = [row[2] for row in rows]


def _variables(atoms: Iterable[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not is_literal(atom))
