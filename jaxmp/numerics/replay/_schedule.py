"""`Schedule`: a jaxpr made ready to run: what each equation is for, when values go."""

import itertools
from typing import NamedTuple

import jax.numpy as jnp

from jaxmp._jaxpr.atoms import variables
from jaxmp._jaxpr.types import Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import jaxpr_consts, open_jaxpr


class Step(NamedTuple):
    """One equation of a schedule.

    Attributes:
      eqn: the equation.
      needed: which of its results the value of the function needs.
      is_later: whether only gradients need it.
      done: the variables that nothing reads after it.
    """

    eqn: Eqn
    needed: tuple[bool, ...]
    is_later: bool
    done: set[Var]


class Schedule:
    """The equations of a jaxpr in order, with its inputs, outputs and constants.

    Attributes:
      steps: a `Step` for each equation.
      consts: the arrays that belong to `constvars`.
    """

    def __init__(self, jaxpr: Jaxpr, needed: tuple[bool, ...]):
        self.jaxpr = jaxpr  # kept alive: its id is the key of this object
        self.consts = [jnp.asarray(x) for x in jaxpr_consts(jaxpr)]
        opened = open_jaxpr(jaxpr)
        self.constvars, self.invars = opened.constvars, opened.invars
        self.outvars = opened.outvars
        self.steps = _steps(opened, needed)


def _steps(jaxpr: Jaxpr, needed: tuple[bool, ...]) -> list[Step]:
    later = set(variables(jaxpr.outvars))
    of_value = set(variables(itertools.compress(jaxpr.outvars, needed)))
    live = set(later)
    steps = []
    for eqn in reversed(jaxpr.eqns):
        inputs = set(variables(eqn.invars))
        of_results = tuple(v in of_value for v in eqn.outvars)
        is_live = not live.isdisjoint(eqn.outvars)
        used = inputs.union(eqn.outvars)
        is_later = is_live and not any(of_results)
        steps.append(Step(eqn, of_results, is_later, used - later))
        later |= used
        of_value |= inputs if any(of_results) else set()
        live |= inputs if is_live else set()
    return steps[::-1]
