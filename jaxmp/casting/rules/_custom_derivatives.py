"""`custom_jvp` and `custom_vjp`: the user's rules are kept, and run in mixed precision.

A call without a matmul is bound whole, in float32 or not at all differently; its rule
then sees the dtypes that it was written for. A call with a matmul, or one that follows
half operands (`jax.nn.relu`), is built anew from two planned functions: the primal, and
the derivative rule (`_planned_derivatives`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxmp._jaxpr.calls import CUSTOM_JVPS, CUSTOM_VJPS, closed_over
from jaxmp._jaxpr.types import Array, Eqn
from jaxmp.casting.plan.plan import Context, EqnPlan, JaxprPlan
from jaxmp.casting.plan.states import State
from jaxmp.casting.planner._interface import Planner
from jaxmp.casting.rules._call import SingleBodyRule, call_plan
from jaxmp.casting.rules._planned_derivatives import (
    PlannedJVP,
    PlannedVJP,
    is_inexact,
    name_of,
)
from jaxmp.casting.run._executor import Executor
from jaxmp.errors import AutocastError


@dataclasses.dataclass
class _CustomCall:
    """The plan of the primal, and what is needed to plan its rule when asked.

    Attributes:
      weights: positions of the operands that are weights, and get their gradients in
        float32.
    """

    primal: JaxprPlan
    planner: Planner
    context: Context
    weights: tuple[int, ...] = ()


class _CustomRule(SingleBodyRule):
    # Its derivative rule is the user's, and gets what the user wrote it for.
    takes_weights = False

    def plan(
        self,
        eqn: Eqn,
        states: Sequence[State | None],
        wants: Sequence[bool],
        planner: Planner,
        context: Context,
    ) -> EqnPlan:
        plan = super().plan(eqn, states, wants, planner, context)
        if plan.call is None:
            return plan
        call = _CustomCall(plan.call, planner, context)
        return call_plan(eqn, plan.call.in_states, plan.out_states, call)

    def primal(
        self, plan: EqnPlan, executor: Executor, closed: Sequence[Array]
    ) -> Callable[..., Any]:
        """The primal as a function of what it does not close over, named like it."""

        def run(*args: Array) -> Any:
            return executor.run(plan.call.primal, self.consts(plan), (*closed, *args))

        run.__name__ = name_of(plan)
        return run


class CustomJVPRule(_CustomRule):
    """Rebuilds the call through `jax.custom_jvp`."""

    primitives = CUSTOM_JVPS

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        closed, args = _split_closed(plan.eqn, operands)
        run = jax.custom_jvp(self.primal(plan, executor, closed))
        run.defjvp(PlannedJVP(plan, executor, closed), symbolic_zeros=True)
        return run(*args)


class CustomVJPRule(_CustomRule):
    """Rebuilds the call through `jax.custom_vjp`."""

    primitives = CUSTOM_VJPS

    def wants(
        self, eqn: Eqn, results: Sequence[bool], planner: Planner, context: Context
    ) -> Sequence[bool]:
        if not planner.contents.of(self.bodies(eqn)[0]).has_matmul:
            return (False,) * len(eqn.invars)
        return super().wants(eqn, results, planner, context)

    def execute(
        self, plan: EqnPlan, operands: Sequence[Array], executor: Executor
    ) -> Any:
        closed, args = _split_closed(plan.eqn, operands)
        closed = [_without_gradient(x) if is_inexact(x) else x for x in closed]
        run = jax.custom_vjp(self.primal(plan, executor, closed))
        rule = PlannedVJP(plan, executor, closed)
        run.defvjp(rule.forward, rule.backward, symbolic_zeros=True)
        return run(*args)


def _split_closed(
    eqn: Eqn, values: Sequence[Array]
) -> tuple[Sequence[Array], Sequence[Array]]:
    """The first operands are what the function closes over: its rule skips them."""
    count = closed_over(eqn)
    return values[:count], values[count:]


@jax.custom_vjp
def _without_gradient(x: jax.Array) -> jax.Array:
    """A value that cannot be differentiated, where the gradient would be wrong."""
    return x


def _refuse(*_: Any) -> Any:
    raise AutocastError(
        "A custom_vjp function closes over a value that has a gradient, and its rule "
        "gives none for it, so the gradient would be wrong. Pass the value to the "
        "function as an argument."
    )


_without_gradient.defvjp(_refuse, _refuse)
