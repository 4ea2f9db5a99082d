"""`scan` and `while`: the dtype of each carry is a fixed point of the body.

A carry that reaches a matmul in the body, in this iteration or through another carry in
a later one, is a hidden state or a residual stream: it is carried in half. Any other is
a running sum or a statistic, and stays float32; so does a parameter that the loop
updates by gradients which it takes itself.

Constants of a scan enter its body in float32 and are cast inside: their cotangents are
summed over the iterations, in the dtype in which they entered. XLA moves the cast out
of the loop.
"""

from collections.abc import Callable, Sequence

from jaxmp._jax_internals import jaxpr_consts, open_jaxpr, scan_arity
from jaxmp.casting._states import NEUTRAL, Kind, castable_dtype, traced_state
from jaxmp.casting.rules._call import CallRule, call_plan, fed, with_outputs

STAYS = frozenset((Kind.PINNED, Kind.KEPT))


def carry_wants(
    wants: Callable[[Sequence[bool]], Sequence[bool]], num_carry: int
) -> tuple[bool, ...]:
    """Which carries are wanted low: the least fixed point of the body's wants."""
    found = (False,) * num_carry
    while True:
        grown = tuple(a or bool(b) for a, b in zip(found, wants(found), strict=True))
        if grown == found:
            return found
        found = grown


def carried(init, want, traced, planner):
    """The state of a carry: half if wanted, else the float32 that it was traced in."""
    if init is None or castable_dtype(traced) is None:
        return None
    if traced_state(traced) is not NEUTRAL:
        return traced_state(traced)
    if init.kind in STAYS:
        return NEUTRAL
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

    def _wants(self, eqn, results, planner, context):
        """Wants of the constants, carries and slices, as the body has them."""
        body = eqn.params["jaxpr"]
        num_consts, num_carry = scan_arity(eqn.params)
        sliced = tuple(results[num_carry:])

        def wants(carry):
            inside = planner.wants(body, (*carry, *sliced), context)
            return inside[num_consts : num_consts + num_carry]

        carry = carry_wants(wants, num_carry)
        return carry, planner.wants(body, (*carry, *sliced), context)

    def wants(self, eqn, results, planner, context):
        return self._wants(eqn, results, planner, context)[1]

    def plan(self, eqn, states, wants, planner, context):
        body = eqn.params["jaxpr"]
        num_consts, num_carry = scan_arity(eqn.params)
        carry, in_wants = self._wants(eqn, wants, planner, context)
        states = [
            fed(s, want, planner) for s, want in zip(states, in_wants, strict=True)
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
            carried(s, want, v, planner)
            for s, want, v in zip(init, carry, traced, strict=True)
        ]

        def plan_body(init):
            inputs = (*consts, *init, *slices)
            out_wants = (*carry, *wants[num_carry:])
            return planner.plan(body, inputs, out_wants, context, jaxpr_consts(body))

        plan, init = settle(init, plan_body, num_carry)
        outs = [*init, *plan.out_states[num_carry:]]
        return call_plan(eqn, (*consts, *init, *slices), outs, with_outputs(plan, outs))

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

    def _wants(self, eqn, planner, context):
        body = eqn.params["body_jaxpr"]
        num_consts = eqn.params["body_nconsts"]
        num_carry = len(eqn.outvars)

        def wants(carry):
            return planner.wants(body, carry, context)[num_consts:]

        carry = carry_wants(wants, num_carry)
        return carry, planner.wants(body, carry, context)

    def wants(self, eqn, results, planner, context):
        inside = self._wants(eqn, planner, context)[1]
        return (*(False,) * eqn.params["cond_nconsts"], *inside)

    def plan(self, eqn, states, wants, planner, context):
        carry, _ = self._wants(eqn, planner, context)
        in_wants = self.wants(eqn, wants, planner, context)
        states = [
            fed(s, want, planner) for s, want in zip(states, in_wants, strict=True)
        ]
        cond_consts, body_consts, init = self._split(eqn, states)
        init = [
            carried(s, want, v, planner)
            for s, want, v in zip(init, carry, eqn.outvars, strict=True)
        ]
        body = eqn.params["body_jaxpr"]

        def plan_body(init):
            consts = jaxpr_consts(body)
            return planner.plan(body, (*body_consts, *init), carry, context, consts)

        plan, init = settle(init, plan_body, len(init))
        cond = eqn.params["cond_jaxpr"]
        cond_plan = planner.plan(
            cond, (*cond_consts, *init), (False,), context, jaxpr_consts(cond)
        )
        calls = (cond_plan, with_outputs(plan, init))
        return call_plan(eqn, (*cond_consts, *body_consts, *init), init, calls)

    def execute(self, plan, operands, executor):
        params = dict(plan.eqn.params)
        for name, inside in zip(("cond_jaxpr", "body_jaxpr"), plan.call, strict=True):
            params[name] = executor.closed(inside, jaxpr_consts(params[name]))
        return plan.eqn.primitive.bind(*operands, **params)
