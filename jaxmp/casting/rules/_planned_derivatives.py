"""The derivative rules of `custom_jvp` and `custom_vjp`, planned when they are needed.

A rule is read off by differentiating the original call, so that it is JAX that checks
what the rule returns, under the name that the user gave it. A rule may refuse to give
more than it is asked for: the original is differentiated for those operands alone that
have a gradient where JAX asks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxmp._jaxpr.calls import function_name
from jaxmp._jaxpr.execution import bind
from jaxmp._jaxpr.types import Array, Eqn
from jaxmp.casting.plan.plan import EqnPlan, JaxprPlan
from jaxmp.casting.plan.states import NEUTRAL, State
from jaxmp.casting.planner._ambient_precision import without_ambient_precision
from jaxmp.casting.planner._weight_gradients import weight_gradients
from jaxmp.casting.run._executor import Executor, cast


def name_of(plan: EqnPlan) -> str:
    """The name of the function that the user gave a rule."""
    return function_name(plan.call.primal.jaxpr) or "run"


class _Original:
    """The call as it was traced, as a function of the operands that have a gradient.

    Args:
      eqn: the call.
      varied: positions of these operands.
    """

    def __init__(self, eqn: Eqn, varied: tuple[int, ...]):
        self.eqn = eqn
        self.avals = [v.aval for v in eqn.invars]
        self.varied = varied
        self.diff_outs = [i for i, v in enumerate(eqn.outvars) if is_inexact(v.aval)]

    def at(self, args: Sequence[Any]) -> tuple[Any, list[Any]]:
        def run(*diff: Array) -> tuple[list[Array], list[Array]]:
            merged = list(args)
            for i, x in zip(self.varied, diff, strict=True):
                merged[i] = x
            outs = bind(self.eqn, merged)
            return [outs[i] for i in self.diff_outs], [
                x for i, x in enumerate(outs) if i not in self.diff_outs
            ]

        return run, [args[i] for i in self.varied]

    def merge(self, diff_outs: Any, others: Any) -> list[Any]:
        diff_outs, others = iter(diff_outs), iter(others)
        return [
            next(diff_outs if i in self.diff_outs else others)
            for i in range(len(self.eqn.outvars))
        ]


class _PlannedRule:
    """What the planned rules of one call share.

    Args:
      plan: the plan of the call.
      executor: runs the rule.
      closed: values of the operands that the function closes over, which come first.
    """

    def __init__(self, plan: EqnPlan, executor: Executor, closed: Sequence[Any]):
        self.plan = plan
        self.executor = executor
        self.closed = closed

    def varied(self, has_gradient: Sequence[bool]) -> tuple[int, ...]:
        """Positions of the operands that have a gradient, given which arguments do."""
        start = len(self.closed)
        return tuple(
            i
            for i, has in enumerate(has_gradient, start)
            if has and is_inexact(self.plan.eqn.invars[i].aval)
        )

    def made(self, make: Callable[[_Original], Any], varied: tuple[int, ...]) -> Any:
        """What `make(original)` gives, made once for these operands."""
        cache, key = self.plan.call.primal.cache, (make.__name__, varied)
        if key not in cache:
            cache[key] = make(_Original(self.plan.eqn, varied))
        return cache[key]


class PlannedJVP(_PlannedRule):
    """A derivative rule for `defjvp`, planned when it is first differentiated."""

    __name__ = "jvp"

    def __call__(
        self, primals: Sequence[Array], tangents: Sequence[Any]
    ) -> tuple[list[Array], list[Any]]:
        varied = self.varied([not isinstance(t, SymbolicZero) for t in tangents])
        original = _Original(self.plan.eqn, varied)
        jaxpr, rule = self.made(self.make_jvp, varied)
        tangents = [tangents[i - len(self.closed)] for i in varied]
        args = (*self.closed, *primals, *tangents)
        outs = self.executor.run(rule, jaxpr.consts, args)
        states = self.plan.out_states
        count = len(states)
        primal_outs = _cast_all(outs[:count], states)
        diff_states = [states[i] for i in original.diff_outs]
        tangent_outs = _cast_all(outs[count:], diff_states)
        zeros = (
            np.zeros(x.shape, jax.dtypes.float0)
            for i, x in enumerate(primal_outs)
            if i not in original.diff_outs
        )
        return primal_outs, original.merge(tangent_outs, zeros)

    def make_jvp(self, original: _Original) -> tuple[Any, JaxprPlan]:
        def jvp(
            args: Sequence[Array], tangents: Sequence[Array]
        ) -> tuple[list[Array], list[Array]]:
            run, diff = original.at(args)
            outs, tangent_outs, others = jax.jvp(run, diff, tangents, has_aux=True)
            return original.merge(outs, others), tangent_outs

        avals = original.avals
        tangent_avals = [avals[i] for i in original.varied]
        with without_ambient_precision(), self.executor.around_rules():
            jaxpr = jax.make_jaxpr(jvp)(avals, tangent_avals)
        states = self.plan.call.primal.in_states
        in_states = (*states, *(states[i] for i in original.varied))
        wants = [s is not None and s.is_low for s in self.plan.out_states]
        wants += [wants[i] for i in original.diff_outs]
        call = self.plan.call
        rule = call.planner.plan(jaxpr, in_states, wants, call.context, jaxpr.consts)
        return jaxpr, rule


class PlannedVJP(_PlannedRule):
    """Forward and backward rules for `defvjp`, planned when first differentiated.

    The residuals are passed on under the positions of the operands that have a
    gradient.
    """

    def forward(self, *args: Any) -> tuple[Any, ...]:
        varied = self.varied([x.perturbed for x in args])
        jaxpr, rule, _ = self.made(self.make_forward, varied)
        values = (*self.closed, *(x.value for x in args))
        outs = self.executor.run(rule, jaxpr.consts, values)
        count = len(self.plan.out_states)
        return _cast_all(outs[:count], self.plan.out_states), {varied: outs[count:]}

    def make_forward(self, original: _Original) -> tuple[Any, JaxprPlan, Any]:
        trees = []

        def forward(*args: Any) -> tuple[Any, ...]:
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

    def backward(self, residuals: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        ((varied, residuals),) = residuals.items()
        diff_outs = _Original(self.plan.eqn, varied).diff_outs
        cotangents = [_instantiated(cotangents[i]) for i in diff_outs]
        jaxpr, rule = self.made(self.make_backward, varied)
        found = self.executor.run(rule, jaxpr.consts, (*residuals, *cotangents))
        in_states = self.plan.call.primal.in_states
        states = [in_states[i] for i in varied]
        found = dict(zip(varied, _cast_all(found, states), strict=True))
        return tuple(found.get(i) for i in range(len(self.closed), len(in_states)))

    def make_backward(self, original: _Original) -> tuple[Any, JaxprPlan]:
        forward_jaxpr, forward, tree = self.made(self.make_forward, original.varied)
        count = len(self.plan.out_states)

        def backward(residuals: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
            try:
                return jax.tree.unflatten(tree, residuals)(cotangents)
            except (TypeError, ValueError) as error:
                # Older releases of JAX do not say whose rule it is.
                name = name_of(self.plan)
                error.add_note(f"This is the custom_vjp rule of {name!r}.")
                raise

        diff_outs = original.diff_outs
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
            for s in (operand_states[i] for i in original.varied)
        ]
        context = call.context._replace(in_backward=True)
        if call.weights:
            of_weights = [i in call.weights for i in original.varied]
            call.planner.weight_gradients |= weight_gradients(jaxpr, of_weights)
        rule = call.planner.plan(jaxpr, in_states, wants, context, jaxpr.consts)
        return jaxpr, rule


def _instantiated(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _entering(state: State | None) -> State | None:
    return state if state is None or state.is_low else NEUTRAL


def _cast_all(values: Sequence[Array], states: Sequence[State | None]) -> list[Any]:
    return [
        x if s is None else cast(x, s.dtype)
        for x, s in zip(values, states, strict=True)
    ]


def is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", np.dtype(bool)), jnp.inexact)
