"""What the rules of calls have in common."""

import abc
from collections.abc import Sequence
from typing import Any

from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.calls import body
from jaxmp._jaxpr.types import Array, Eqn, Jaxpr
from jaxmp._jaxpr.versions import jaxpr_consts
from jaxmp.casting.islands._schedule import schedule
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import Context, EqnPlan, JaxprPlan, as_island
from jaxmp.casting.plan.states import NEUTRAL, Kind, State, traced_state
from jaxmp.casting.planner._interface import Planner
from jaxmp.casting.run._executor import Executor


class CallRule(abc.ABC):
    """Plans and runs one kind of primitive that holds jaxprs.

    Attributes:
      primitives: names of the primitives.
      is_composite: whether a call without a matmul in it may be bound whole.
      is_loop: whether its body runs more than once.
      takes_weights: whether its body may get weights as they are kept.
    """

    primitives: tuple[str, ...] = ()
    is_composite = True
    is_loop = False
    takes_weights = True

    @abc.abstractmethod
    def bodies(self, eqn: Eqn) -> list[Jaxpr]:
        """The jaxprs that the equation holds."""

    @abc.abstractmethod
    def wants(
        self, eqn: Eqn, results: Sequence[bool], planner: Planner, context: Context
    ) -> Sequence[bool]:
        """Which operands are wanted low, given which results are."""

    @abc.abstractmethod
    def plan(
        self,
        eqn: Eqn,
        states: Sequence[State | None],
        wants: Sequence[bool],
        planner: Planner,
        context: Context,
    ) -> EqnPlan:
        """Plans the bodies, and so the equation."""

    @abc.abstractmethod
    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        """Binds the equation with its planned bodies."""


class SingleBodyRule(CallRule):
    """A call of one body, with the same operands and results as the body."""

    def bodies(self, eqn: Eqn) -> list[Jaxpr]:
        return [body(eqn)]

    def wants(
        self, eqn: Eqn, results: Sequence[bool], planner: Planner, context: Context
    ) -> Sequence[bool]:
        return planner.wants(self.bodies(eqn)[0], results, context).inputs

    def plan(
        self,
        eqn: Eqn,
        states: Sequence[State | None],
        wants: Sequence[bool],
        planner: Planner,
        context: Context,
    ) -> EqnPlan:
        inner = self.bodies(eqn)[0]
        in_wants = planner.wants(inner, wants, context).inputs
        is_active = any(s not in (None, NEUTRAL) for s in states)
        entering = fed(states, in_wants, planner)
        plan = planner.plan(inner, entering, wants, context, jaxpr_consts(inner))
        if plan.is_as_traced and not any(s is not None and s.is_low for s in entering):
            outs = tuple(map(traced_state, eqn.outvars))
            dtypes = tuple(map(castable_dtype, eqn.invars))
            reason = "a call that stays as it is"
            bound = EqnPlan(eqn, OpClass.UNTOUCHED, reason, dtypes, outs)
            return as_island(bound) if is_active else bound
        return call_plan(eqn, plan.in_states, plan.out_states, plan)

    def consts(self, plan: EqnPlan) -> Sequence[Any]:
        """The constants of the body."""
        return jaxpr_consts(self.bodies(plan.eqn)[0])


def fed(
    states: Sequence[State | None], wants: Sequence[bool], planner: Planner
) -> list[State | None]:
    """The states in which values enter a body.

    The result of a float32 island enters in half where the body wants half.
    """

    def enters(state: State | None, want: bool) -> State | None:
        if state is None or state.kind is not Kind.FULL:
            return state
        return planner.low if want else NEUTRAL

    return [enters(s, want) for s, want in zip(states, wants, strict=True)]


def call_plan(
    eqn: Eqn,
    in_states: Sequence[State | None],
    out_states: Sequence[State | None],
    call: Any,
) -> EqnPlan:
    """The plan of a call, from the states of what goes in and comes out."""
    dtypes = tuple(None if s is None else s.dtype for s in in_states)
    return EqnPlan(
        eqn, OpClass.FOLLOW, "a call, planned inside", dtypes, tuple(out_states),
        call=call,
    )  # fmt: skip


def with_outputs(plan: JaxprPlan, states: Sequence[State | None]) -> JaxprPlan:
    """The same plan with outputs cast to other dtypes; the caller knows they differ."""
    if tuple(states) == plan.out_states:
        return plan
    recompute = any(getattr(step, "recompute", False) for step in plan.steps)
    steps = schedule(plan.eqns, plan.jaxpr, plan.in_states, states, recompute)
    return JaxprPlan(plan.jaxpr, plan.in_states, tuple(states), plan.eqns, steps)
