"""`custom_jvp` and `custom_vjp`: the user's rules are kept, and run in mixed precision.

A call without a matmul is bound whole, in float32 or not at all differently; its rule
then sees the dtypes that it was written for. A call with a matmul, or one that follows
half operands (`jax.nn.relu`), is built anew from two planned functions: the primal, and
the derivative rule. The rule is read off by differentiating the original call, so that
it is JAX that checks what the rule returns, under the name that the user gave it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.casting._ambient import without_ambient_precision
from jaxmp.casting._execute import cast
from jaxmp.casting._plan import Context, EqnPlan, JaxprPlan
from jaxmp.casting._planner import Planner
from jaxmp.casting._states import NEUTRAL, State
from jaxmp.casting.rules._call import SingleBodyRule, call_plan
from jaxmp.errors import AutocastError


@dataclasses.dataclass
class _CustomCall:
    """The plan of the primal, and what is needed to plan its rule when asked."""

    primal: JaxprPlan
    planner: Planner
    context: Context


class _CustomRule(SingleBodyRule):
    body_name = "call_jaxpr"

    def plan(self, eqn, states, wants, planner, context):
        plan = super().plan(eqn, states, wants, planner, context)
        if plan.call is None:
            return plan
        call = _CustomCall(plan.call, planner, context)
        return call_plan(eqn, plan.call.in_states, plan.out_states, call)

    def primal(self, plan: EqnPlan, executor: Any, closed: Sequence[Any]) -> Any:
        """The primal as a function of what it does not close over, named like it."""

        def run(*args):
            return executor.run(plan.call.primal, self.consts(plan), (*closed, *args))

        info = getattr(plan.call.primal.jaxpr, "debug_info", None)
        run.__name__ = getattr(info, "func_name", None) or "run"
        return run


class CustomJVPRule(_CustomRule):
    """Rebuilds the call through `jax.custom_jvp`."""

    primitives = ("custom_jvp_call",)

    def execute(self, plan, operands, executor):
        closed, args = _split_closed(plan.eqn, operands)
        run = jax.custom_jvp(self.primal(plan, executor, closed))
        run.defjvp(_PlannedJVP(plan, executor, closed))
        return run(*args)


class CustomVJPRule(_CustomRule):
    """Rebuilds the call through `jax.custom_vjp`."""

    primitives = ("custom_vjp_call", "custom_vjp_call_jaxpr")

    def wants(self, eqn, results, planner, context):
        if not planner.contents(self.bodies(eqn)[0]).has_matmul:
            return (False,) * len(eqn.invars)
        return super().wants(eqn, results, planner, context)

    def execute(self, plan, operands, executor):
        closed, args = _split_closed(plan.eqn, operands)
        closed = [_without_gradient(x) if _is_inexact(x) else x for x in closed]
        primal = self.primal(plan, executor, closed)
        run = jax.custom_vjp(primal)
        rule = _PlannedVJP(plan, executor, closed, primal.__name__)
        run.defvjp(rule.forward, rule.backward)
        return run(*args)


def _split_closed(eqn: Any, values: Sequence[Any]) -> tuple[Any, Any]:
    """The first operands are what the function closes over: its rule skips them."""
    count = eqn.params["num_consts"]
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


class _Original:
    """The call as it was traced, as a function of its differentiable operands."""

    def __init__(self, eqn: Any):
        self.eqn = eqn
        self.avals = [v.aval for v in eqn.invars]
        self.closed = eqn.params["num_consts"]
        self.diff = [
            i for i, a in enumerate(self.avals) if _is_inexact(a) and i >= self.closed
        ]
        self.diff_outs = [i for i, v in enumerate(eqn.outvars) if _is_inexact(v.aval)]

    def at(self, args):
        def run(*diff):
            merged = list(args)
            for i, x in zip(self.diff, diff, strict=True):
                merged[i] = x
            params = self.eqn.primitive.get_bind_params(self.eqn.params)
            outs = self.eqn.primitive.bind(*merged, **params)
            return [outs[i] for i in self.diff_outs], [
                x for i, x in enumerate(outs) if i not in self.diff_outs
            ]

        return run, [args[i] for i in self.diff]

    def merge(self, diff_outs, others) -> list[Any]:
        diff_outs, others = iter(diff_outs), iter(others)
        return [
            next(diff_outs if i in self.diff_outs else others)
            for i in range(len(self.eqn.outvars))
        ]


class _PlannedJVP:
    """A derivative rule for `defjvp`, planned when it is first differentiated."""

    def __init__(self, plan: EqnPlan, executor: Any, closed: Sequence[Any]):
        self.plan = plan
        self.executor = executor
        self.closed = closed
        self.original = _Original(plan.eqn)
        self.__name__ = "jvp"

    def __call__(self, primals, tangents):
        cache = self.plan.call.primal.cache
        if "jvp" not in cache:
            cache["jvp"] = self.make()
        jaxpr, rule = cache["jvp"]
        tangents = [tangents[i - len(self.closed)] for i in self.original.diff]
        args = (*self.closed, *primals, *tangents)
        outs = self.executor.run(rule, jaxpr.consts, args)
        states = self.plan.out_states
        count = len(states)
        primal_outs = _cast_all(outs[:count], states)
        diff_states = [states[i] for i in self.original.diff_outs]
        tangent_outs = _cast_all(outs[count:], diff_states)
        zeros = (
            np.zeros(x.shape, jax.dtypes.float0)
            for i, x in enumerate(primal_outs)
            if i not in self.original.diff_outs
        )
        return primal_outs, self.original.merge(tangent_outs, zeros)

    def make(self) -> tuple[Any, JaxprPlan]:
        original = self.original

        def jvp(args, tangents):
            run, diff = original.at(args)
            outs, tangent_outs, others = jax.jvp(run, diff, tangents, has_aux=True)
            return original.merge(outs, others), tangent_outs

        avals = original.avals
        tangent_avals = [avals[i] for i in original.diff]
        with without_ambient_precision(), self.executor.around_rules():
            jaxpr = jax.make_jaxpr(jvp)(avals, tangent_avals)
        states = self.plan.call.primal.in_states
        in_states = (*states, *(states[i] for i in original.diff))
        wants = [s is not None and s.is_low for s in self.plan.out_states]
        wants += [wants[i] for i in original.diff_outs]
        call = self.plan.call
        rule = call.planner.plan(jaxpr, in_states, wants, call.context, jaxpr.consts)
        return jaxpr, rule


class _PlannedVJP:
    """Forward and backward rules for `defvjp`, planned when first differentiated."""

    def __init__(self, plan: EqnPlan, executor: Any, closed: Sequence[Any], name: str):
        self.plan = plan
        self.executor = executor
        self.closed = closed
        self.name = name
        self.original = _Original(plan.eqn)

    def forward(self, *args):
        cache = self.plan.call.primal.cache
        if "forward" not in cache:
            cache["forward"] = self.make_forward()
        jaxpr, rule, _ = cache["forward"]
        outs = self.executor.run(rule, jaxpr.consts, (*self.closed, *args))
        count = len(self.plan.out_states)
        return _cast_all(outs[:count], self.plan.out_states), outs[count:]

    def make_forward(self) -> tuple[Any, JaxprPlan, Any]:
        original, trees = self.original, []

        def forward(*args):
            run, diff = original.at(args)
            outs, vjp, others = jax.vjp(run, *diff, has_aux=True)
            residuals, tree = jax.tree.flatten(vjp)
            trees.append(tree)
            return (*original.merge(outs, others), *residuals)

        with without_ambient_precision(), self.executor.around_rules():
            jaxpr = jax.make_jaxpr(forward)(*original.avals)
        call, count = self.plan.call, len(self.plan.out_states)
        wants = [s is not None and s.is_low for s in self.plan.out_states]
        wants += [False] * (len(jaxpr.out_avals) - count)
        states = call.primal.in_states
        rule = call.planner.plan(jaxpr, states, wants, call.context, jaxpr.consts)
        return jaxpr, rule, trees[0]

    def backward(self, residuals, cotangents):
        cotangents = [cotangents[i] for i in self.original.diff_outs]
        cache = self.plan.call.primal.cache
        if "backward" not in cache:
            cache["backward"] = self.make_backward()
        jaxpr, rule = cache["backward"]
        found = self.executor.run(rule, jaxpr.consts, (*residuals, *cotangents))
        in_states = self.plan.call.primal.in_states
        states = [in_states[i] for i in self.original.diff]
        found = dict(zip(self.original.diff, _cast_all(found, states), strict=True))
        return tuple(found.get(i) for i in range(len(self.closed), len(in_states)))

    def make_backward(self) -> tuple[Any, JaxprPlan]:
        forward_jaxpr, forward, tree = self.plan.call.primal.cache["forward"]
        count = len(self.plan.out_states)

        def backward(residuals, cotangents):
            try:
                return jax.tree.unflatten(tree, residuals)(cotangents)
            except (TypeError, ValueError) as error:
                # Older releases of JAX do not say whose rule it is.
                error.add_note(f"This is the custom_vjp rule of {self.name!r}.")
                raise

        diff_outs = self.original.diff_outs
        cotangent_avals = [self.plan.eqn.outvars[i].aval for i in diff_outs]
        residual_avals = forward_jaxpr.out_avals[count:]
        with without_ambient_precision(), self.executor.around_rules():
            jaxpr = jax.make_jaxpr(backward)(residual_avals, cotangent_avals)
        call = self.plan.call
        in_states = [
            *forward.out_states[count:],
            *(_entering(self.plan.out_states[i]) for i in diff_outs),
        ]
        operand_states = call.primal.in_states
        wants = [
            s is not None and s.is_low
            for s in (operand_states[i] for i in self.original.diff)
        ]
        context = call.context._replace(in_backward=True)
        rule = call.planner.plan(jaxpr, in_states, wants, context, jaxpr.consts)
        return jaxpr, rule


def _entering(state: State | None) -> State | None:
    return state if state is None or state.is_low else NEUTRAL


def _cast_all(values, states) -> list[Any]:
    return [
        x if s is None else cast(x, s.dtype)
        for x, s in zip(values, states, strict=True)
    ]


def _is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", np.dtype(bool)), jnp.inexact)
