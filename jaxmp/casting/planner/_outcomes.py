"""The plans that an equation can get, one method for each outcome."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_integer, is_literal
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.scopes import is_backward
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp.casting.islands._label_gather import has_pick
from jaxmp.casting.ops import _registry
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import Context, EqnPlan
from jaxmp.casting.plan.states import (
    FLOAT32,
    FULL,
    NEUTRAL,
    Kind,
    State,
    low,
    traced_state,
)
from jaxmp.casting.planner._ambient_precision import precision_params
from jaxmp.casting.planner._constants import Constants
from jaxmp.casting.planner._following import Choice
from jaxmp.casting.planner._interface import Planner
from jaxmp.casting.planner._island_inputs import IslandInputs

States = Sequence[State | None]

_DEFAULT = (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT)


class Outcomes:
    """Makes the plans of a jaxpr's equations.

    It remembers what they leave behind: the constants that are known, and which low
    values feed which island.
    """

    def __init__(
        self, planner: Planner, jaxpr: Jaxpr, context: Context, consts: Sequence[Any]
    ):
        self.settings = planner.settings
        self.low = planner.low
        self.constants = Constants(planner.settings.compute_dtype, jaxpr, consts)
        self.islands = IslandInputs()
        self._contents = planner.contents
        self._context = context

    def in_backward(self, eqn: Eqn) -> bool:
        """Whether an equation is part of a backward pass."""
        return self._context.in_backward or is_backward(eqn)

    def untouched(self, eqn: Eqn, reason: str) -> EqnPlan:
        """Operands and results as they were traced."""
        outs = tuple(map(traced_state, eqn.outvars))
        dtypes = tuple(map(castable_dtype, eqn.invars))
        params = precision_params(eqn, self.settings)
        return EqnPlan(eqn, OpClass.UNTOUCHED, reason, dtypes, outs, params=params)

    def compute(
        self, eqn: Eqn, states: States, reason: str, dtype: np.dtype | None = None
    ) -> EqnPlan:
        """A matmul, or what a rule computes in a dtype; by default the policy's."""
        dtype = dtype or self.settings.compute_dtype
        bad = self.constants.unfit(eqn.invars, dtype)
        if bad is not None:
            return self.full(eqn, states, bad)
        if dtype == FLOAT32:
            params = precision_params(eqn, self.settings)
            in_dtypes = tuple(castable_dtype(v) and FLOAT32 for v in eqn.invars)
            outs = tuple(castable_dtype(v) and NEUTRAL for v in eqn.outvars)
            return EqnPlan(eqn, OpClass.COMPUTE, reason, in_dtypes, outs, params=params)
        state = self.made_in(eqn, dtype)
        plan = self._half(eqn, state, OpClass.COMPUTE, reason)
        if eqn.primitive.name not in MATMULS:
            return plan
        if any(map(is_integer, eqn.invars[:2])):
            plan.in_dtypes = (dtype, dtype, *plan.in_dtypes[2:])
        if self.settings.ambient and eqn.params["precision"] is None:
            # JAX would give its gradients the ambient precision.
            plan.params = {**(plan.params or eqn.params), "precision": _DEFAULT}
        return plan

    def made_in(self, eqn: Eqn, dtype: np.dtype) -> State:
        """The state of what an equation makes in a half dtype."""
        return State(Kind.GRADIENT if self.in_backward(eqn) else Kind.LOW, dtype)

    def full(
        self, eqn: Eqn, states: States, reason: str, out: State | None = None
    ) -> EqnPlan:
        """Operands in float32, as part of an island unless all come from outside.

        Args:
          eqn: the equation.
          states: of its operands.
          reason: why.
          out: the state of its float32 results, if it is another than these give.
        """
        is_active = any(
            s is not None and s.kind is not Kind.NEUTRAL and not is_literal(v)
            for v, s in zip(eqn.invars, states, strict=True)
        )
        state = out or (FULL if is_active else NEUTRAL)
        outs = tuple(
            None if dtype is None else low(dtype) if dtype in _tree.HALF else state
            for dtype in map(castable_dtype, eqn.outvars)
        )
        in_dtypes = tuple(castable_dtype(v) and FLOAT32 for v in eqn.invars)
        can_join = eqn.outvars and not eqn.effects and self._contents.is_cheap(eqn)
        in_island = is_active and bool(can_join)
        if in_island:
            self.islands.add(eqn, states)
        params = precision_params(eqn, self.settings)
        return EqnPlan(eqn, OpClass.FULL, reason, in_dtypes, outs, in_island, params)

    def outside(self, eqn: Eqn, reason: str) -> EqnPlan:
        """In float32, of values that all come from outside."""
        return self.full(eqn, [None] * len(eqn.invars), reason)

    def follow(self, eqn: Eqn, states: States, choice: Choice) -> EqnPlan:
        """In the state that was chosen from the neighbours."""
        state, reason = choice
        if state.is_low:
            plan = self._half(eqn, state, OpClass.FOLLOW, reason)
            self.islands.moved(eqn)
            if eqn.primitive.name == "gather" and not has_pick(eqn):
                # Its gradient adds up in the dtype in which it is gathered from.
                wide = tuple(dtype and FLOAT32 for dtype in plan.in_dtypes)
                plan = dataclasses.replace(plan, in_dtypes=wide)
        elif state.kind is Kind.NEUTRAL:
            plan = self.outside(eqn, reason)
            self.constants.carry(eqn)
        else:
            plan = self.full(eqn, states, reason, state)
        return dataclasses.replace(plan, op_class=OpClass.FOLLOW)

    def lookup(self, eqn: Eqn, stored: np.dtype = FLOAT32) -> EqnPlan:
        """Reads a table whose gradient is added up as it is stored; rows are half."""
        dtypes = (stored, *map(castable_dtype, eqn.invars[1:]))
        outs = tuple(castable_dtype(v) and self.low for v in eqn.outvars)
        reason = "a lookup in a float32 table"
        return EqnPlan(eqn, OpClass.FOLLOW, reason, dtypes, outs, is_lookup=True)

    def _half(self, eqn: Eqn, state: State, op_class: OpClass, reason: str) -> EqnPlan:
        """Operands and results in one half dtype."""
        in_dtypes = tuple(castable_dtype(v) and state.dtype for v in eqn.invars)
        outs = tuple(castable_dtype(v) and state for v in eqn.outvars)
        params = _registry.params_at(eqn.primitive.name, eqn.params, state.dtype)
        return EqnPlan(eqn, op_class, reason, in_dtypes, outs, params=params)
