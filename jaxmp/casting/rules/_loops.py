"""`scan` and `while`: the dtype of each carry is a fixed point of the body.

A carry that reaches a matmul in the body, in this iteration or through another carry in
a later one, is a hidden state or a residual stream: it is carried in half. Any other is
a statistic, and stays float32. So do a sum, `a * old + increment`, whoever reads it
(`_sums` tells it from a residual stream), and a parameter that the loop updates by
gradients which it takes itself.

Constants of a scan enter its body in float32 and are cast inside: their cotangents are
summed over the iterations, in the dtype in which they entered. XLA moves the cast out
of the loop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmp._jaxpr.versions import jaxpr_consts, open_jaxpr, scan_arity
from jaxmp.casting.plan._plan import Context
from jaxmp.casting.plan._planner import Planner
from jaxmp.casting.plan._states import (
    FLOAT32,
    KEPT,
    NEUTRAL,
    Kind,
    castable_dtype,
    is_literal,
    traced_state,
)
from jaxmp.casting.rules._call import CallRule, call_plan, fed, with_outputs

STAYS = frozenset((Kind.PINNED, Kind.KEPT))


class Carries(NamedTuple):
    """What is known about the carries of a loop before their states are.

    Attributes:
      wants: which are wanted low.
      sums: which are sums that would be wanted low, but are not.
      inputs: which inputs of the body are wanted low.
      context: of the body, with the equations that update the sums.
    """

    wants: tuple[bool, ...]
    sums: tuple[bool, ...]
    inputs: tuple[bool, ...]
    context: Context


def find_carries(
    planner: Planner,
    body: Any,
    num_consts: int,
    others: Sequence[bool],
    length: int | None,
    context: Context,
    decided: np.dtype | None,
) -> Carries:
    """Finds which carries of a loop are wanted low: the least fixed point of the body.

    Args:
      planner: of the body.
      body: the jaxpr, of constants, carries and other inputs.
      num_consts: how many constants it has.
      others: which of its outputs besides the carries are wanted low.
      length: how often it runs, if that is known.
      context: of the body.
      decided: the dtype that a rule of the user's gives to carries, if there is one.
    """
    opened = open_jaxpr(body)
    count = len(opened.outvars) - len(others)
    traced = opened.invars[num_consts : num_consts + count]
    sums = (False,) * count

    def fixed_point() -> tuple[bool, ...]:
        found = (False,) * count
        while True:
            inputs = planner.wants(body, (*found, *others), context)
            inputs = inputs[num_consts : num_consts + count]
            grown = tuple(
                (a or b) and not is_sum
                for a, b, is_sum in zip(found, inputs, sums, strict=True)
            )
            if grown == found:
                return found
            found = grown

    carry = fixed_point()
    wanted = planner.wanted(body, (*carry, *others), context)
    updates = context.updates

    def is_sum(i: int) -> bool:
        nonlocal updates
        if decided is not None:
            return decided == FLOAT32
        found = planner.updates(body, num_consts + i, i, length, context)
        updates |= found
        return bool(found)

    sums = tuple(
        traced_state(v) is NEUTRAL
        and not is_literal(out)
        and (v in wanted or out in wanted)
        and is_sum(i)
        for i, (v, out) in enumerate(zip(traced, opened.outvars, strict=False))
    )
    if any(sums):
        context = context._replace(updates=updates)
        carry = fixed_point()
    inputs = list(planner.wants(body, (*carry, *others), context))
    inputs[num_consts : num_consts + count] = carry
    return Carries(carry, sums, tuple(inputs), context)


def carried(init, want, is_sum, traced, planner):
    """The state of a carry: half if wanted, else the float32 that it was traced in."""
    if init is None or castable_dtype(traced) is None:
        return None
    if traced_state(traced) is not NEUTRAL:
        return traced_state(traced)
    if is_sum:
        return KEPT
    if init.kind in STAYS:
        return NEUTRAL
    return planner.low if want else NEUTRAL


def released(state, want, planner):
    """The state outside of a loop of what it keeps: its readers decide again."""
    if state is None or state.kind is not Kind.KEPT:
        return state
    return planner.low if want else NEUTRAL


def settle(states, plan_body, num_carry):
    """Plans a body until the carries that it returns have the dtypes that it takes.

    A carry that the body keeps in float32 is carried in float32.
    """
    while True:
        plan = plan_body(states)
        pinned = [
            before is not None
            and before.is_low
            and after is not None
            and after.kind in STAYS
            for before, after in zip(states, plan.out_states[:num_carry], strict=True)
        ]
        if not any(pinned):
            return plan, states
        states = [
            NEUTRAL if pin else state for pin, state in zip(pinned, states, strict=True)
        ]


class ScanRule(CallRule):
    """Binds the same scan with another body."""

    primitives = ("scan",)
    is_loop = True

    def bodies(self, eqn):
        return [eqn.params["jaxpr"]]

    def _carries(self, eqn, results, planner, context):
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        num_consts, num_carry = scan_arity(eqn.params)
        others = tuple(results[num_carry:])
        decided = planner.carry_dtype(eqn, context)
        return find_carries(planner, body, num_consts, others, length, context, decided)

    def wants(self, eqn, results, planner, context):
        return self._carries(eqn, results, planner, context).inputs

    def plan(self, eqn, states, wants, planner, context):
        body = eqn.params["jaxpr"]
        num_consts, num_carry = scan_arity(eqn.params)
        carries = self._carries(eqn, wants, planner, context)
        states = [
            fed(s, want, planner)
            for s, want in zip(states, carries.inputs, strict=True)
        ]
        consts, init, slices = (
            states[:num_consts],
            states[num_consts : num_consts + num_carry],
            states[num_consts + num_carry :],
        )
        if not context.in_backward:
            consts = [
                NEUTRAL if s is not None and traced_state(v) is NEUTRAL else s
                for s, v in zip(consts, eqn.invars, strict=False)
            ]
        traced = open_jaxpr(body).invars[num_consts : num_consts + num_carry]
        init = [
            carried(s, want, is_sum, v, planner)
            for s, want, is_sum, v in zip(
                init, carries.wants, carries.sums, traced, strict=True
            )
        ]

        def plan_body(init):
            inputs = (*consts, *init, *slices)
            out_wants = (*carries.wants, *wants[num_carry:])
            closed = jaxpr_consts(body)
            return planner.plan(body, inputs, out_wants, carries.context, closed)

        plan, init = settle(init, plan_body, num_carry)
        others = [
            released(s, want, planner)
            for s, want in zip(
                plan.out_states[num_carry:], wants[num_carry:], strict=True
            )
        ]
        plan = with_outputs(plan, [*init, *others])
        outs = [*(released(s, False, planner) for s in init), *others]
        return call_plan(eqn, (*consts, *init, *slices), outs, plan)

    def execute(self, plan, operands, executor):
        consts = jaxpr_consts(plan.eqn.params["jaxpr"])
        params = {**plan.eqn.params, "jaxpr": executor.closed(plan.call, consts)}
        return plan.eqn.primitive.bind(*operands, **params)


class WhileRule(CallRule):
    """Binds the same loop with another condition and body, which agree on the carry."""

    primitives = ("while",)
    is_loop = True

    def bodies(self, eqn):
        return [eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]]

    def _split(self, eqn, values):
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        return values[:first], values[first:second], values[second:]

    def _carries(self, eqn, planner, context):
        body, num_consts = eqn.params["body_jaxpr"], eqn.params["body_nconsts"]
        decided = planner.carry_dtype(eqn, context)
        return find_carries(planner, body, num_consts, (), None, context, decided)

    def wants(self, eqn, results, planner, context):
        inputs = self._carries(eqn, planner, context).inputs
        return (*(False,) * eqn.params["cond_nconsts"], *inputs)

    def plan(self, eqn, states, wants, planner, context):
        carries = self._carries(eqn, planner, context)
        in_wants = (*(False,) * eqn.params["cond_nconsts"], *carries.inputs)
        states = [
            fed(s, want, planner) for s, want in zip(states, in_wants, strict=True)
        ]
        cond_consts, body_consts, init = self._split(eqn, states)
        init = [
            carried(s, want, is_sum, v, planner)
            for s, want, is_sum, v in zip(
                init, carries.wants, carries.sums, eqn.outvars, strict=True
            )
        ]
        body = eqn.params["body_jaxpr"]

        def plan_body(init):
            inputs, consts = (*body_consts, *init), jaxpr_consts(body)
            return planner.plan(body, inputs, carries.wants, carries.context, consts)

        plan, init = settle(init, plan_body, len(init))
        cond = eqn.params["cond_jaxpr"]
        cond_plan = planner.plan(
            cond, (*cond_consts, *init), (False,), context, jaxpr_consts(cond)
        )
        calls = (cond_plan, with_outputs(plan, init))
        outs = [released(s, False, planner) for s in init]
        return call_plan(eqn, (*cond_consts, *body_consts, *init), outs, calls)

    def execute(self, plan, operands, executor):
        params = dict(plan.eqn.params)
        for name, inside in zip(("cond_jaxpr", "body_jaxpr"), plan.call, strict=True):
            params[name] = executor.closed(inside, jaxpr_consts(params[name]))
        return plan.eqn.primitive.bind(*operands, **params)
