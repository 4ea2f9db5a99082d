"""Weights that get their gradients in float32, followed from where they come in.

A matmul that reads a float32 value from outside can give it a float32 gradient. So can
one that reads what the program itself cast to half, as Flax's layers do, if the cast is
put off until the weight is read.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.calls import CUSTOM_VJPS, JITS, body
from jaxmp._jaxpr.primitives import ADDS, CAST, LAYOUT, MATMULS, SUMS_INTO
from jaxmp._jaxpr.types import Atom, Eqn, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._tree import HALF
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import LAYER_REASON, Decision, EqnPlan
from jaxmp.casting.plan.states import FLOAT32, KEPT, Kind, State, weight
from jaxmp.casting.planner._outcomes import Outcomes, States

_REDUCED = "gradients of weights leave it in float32"
_LOOKUPS = frozenset(("gather",))
_REPEATING = ADDS | {"mul", "div", "max", "min"}
_MOVES = LAYOUT | {"dynamic_slice", "split", "unstack"}


class Weights:
    """The weights of one jaxpr: what came in, and was only moved or cast since."""

    def __init__(self) -> None:
        self._activations: set[Var] = set()

    def handed_on(
        self,
        eqn: Eqn,
        states: States,
        decision: Decision | None,
        outcomes: Outcomes,
    ) -> EqnPlan | None:
        """The plan of an equation that casts a weight, or moves one; else None.

        Args:
          eqn: the equation, in a forward pass.
          states: of its operands.
          decision: what the user decided about it.
          outcomes: of its jaxpr.
        """
        state = states[0] if states else None
        if state is None or not self.is_from_outside(eqn.invars[0]):
            return None
        if not _is_open(decision):
            return None
        name = eqn.primitive.name
        if name == CAST:
            is_cast = state.kind is Kind.NEUTRAL and eqn.params["new_dtype"] in HALF
            if not is_cast or castable_dtype(eqn.invars[0]) != FLOAT32:
                return None
            params = {**eqn.params, "new_dtype": FLOAT32}
            reason = "a weight, cast to half where it is read"
            return _moved(eqn, FLOAT32, reason, params=params)
        if state.kind is not Kind.WEIGHT:
            return None
        if name in _MOVES:
            return _moved(eqn, state.dtype, "a weight, read in half")
        if name == "gather" and castable_dtype(eqn.outvars[0]) == outcomes.low.dtype:
            self._activations.update(eqn.outvars)
            return outcomes.lookup(eqn, state.dtype)
        return None

    def read_by(self, plan: EqnPlan, states: States, is_half: bool) -> EqnPlan:
        """The plan of an equation, with the weights that it reads if it is a matmul.

        Args:
          plan: of any equation of a forward pass.
          states: of its operands.
          is_half: whether weights get their gradients in half there.
        """
        eqn = plan.eqn
        if eqn.primitive.name in CUSTOM_VJPS and plan.call is not None:
            # Its own rule makes the gradients, in the dtype of the operand.
            weights = [] if is_half else self._among(eqn, states)
            weights = [i for i in weights if castable_dtype(eqn.invars[i]) == FLOAT32]
            call = dataclasses.replace(plan.call, weights=tuple(weights))
            plan = dataclasses.replace(plan, call=call)
        if eqn.primitive.name not in MATMULS:
            makes = _holds(eqn, _LOOKUPS) or any(
                map(self._is_activation, eqn.invars, states)
            )
            self._activations.update(eqn.outvars if makes else ())
            return plan
        self._activations.update(eqn.outvars)
        weights = self._among(eqn, states)
        found = tuple(i for i in weights if i < 2 and plan.in_dtypes[i] in HALF)
        if is_half or not found:
            return plan
        reason = f"{plan.reason}; {_REDUCED}"
        return dataclasses.replace(plan, weights=found, reason=reason)

    def _among(self, eqn: Eqn, states: States) -> list[int]:
        """The positions of the operands that are weights."""
        return [
            i
            for i, (v, state) in enumerate(zip(eqn.invars, states, strict=True))
            if self.is_from_outside(v)
            and getattr(state, "kind", None) in (Kind.NEUTRAL, Kind.WEIGHT)
        ]

    def is_from_outside(self, atom: Atom) -> bool:
        """Whether nothing was computed from activations to make a value."""
        return not is_literal(atom) and atom not in self._activations

    def _is_activation(self, atom: Atom, state: State | None) -> bool:
        if state is None or is_literal(atom):
            return False
        is_made = state.kind not in (Kind.NEUTRAL, Kind.WEIGHT)
        return is_made or atom in self._activations


def wide_gradient(plan: EqnPlan) -> EqnPlan:
    """The plan of a matmul that makes the gradient of a weight: it returns float32."""
    if not all(dtype in HALF for dtype in plan.in_dtypes[:2]):
        return plan
    reason = f"{plan.reason}; {_REDUCED}"
    return dataclasses.replace(plan, reason=reason, is_wide=True, out_states=(KEPT,))


def repeating(plan: EqnPlan) -> EqnPlan:
    """The plan of an operation in half that repeats an operand, as `x + bias` does."""
    eqn = plan.eqn
    if eqn.primitive.name not in _REPEATING or plan.in_island:
        return plan
    (result,) = eqn.outvars
    repeats = tuple(
        i
        for i, (v, dtype) in enumerate(zip(eqn.invars, plan.in_dtypes, strict=True))
        if dtype in HALF
        and not is_literal(v)
        and len(v.aval.shape) == len(result.aval.shape)
        and v.aval.size < result.aval.size
    )
    return dataclasses.replace(plan, repeats=repeats) if repeats else plan


def apart(plan: EqnPlan, in_backward: bool) -> EqnPlan:
    """The plan of a sum into the rows of a table, which stays apart from other sums."""
    if in_backward and plan.call is None and _holds(plan.eqn, SUMS_INTO):
        return dataclasses.replace(plan, is_apart=True)
    return plan


def _holds(eqn: Eqn, names: frozenset[str]) -> bool:
    """Whether an equation is one of these on floats, or a `jit` around one."""
    if eqn.primitive.name in names:
        return castable_dtype(eqn.outvars[0]) is not None
    if eqn.primitive.name not in JITS or len(eqn.outvars) != 1:
        return False
    return any(_holds(inner, names) for inner in open_jaxpr(body(eqn)).eqns)


def _is_open(decision: Decision | None) -> bool:
    """Whether nobody but a layer's author decided."""
    return decision is None or decision.reason == LAYER_REASON


def _moved(eqn: Eqn, dtype: np.dtype, reason: str, **changes: Any) -> EqnPlan:
    first, *rest = map(castable_dtype, eqn.invars)
    assert first is not None
    outs = tuple(weight(dtype) for _ in eqn.outvars)
    plan = EqnPlan(eqn, OpClass.FOLLOW, reason, (dtype, *rest), outs)
    return dataclasses.replace(plan, **changes)
