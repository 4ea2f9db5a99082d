"""Runs a plan: binds the equations again, in the dtypes that the plan gives them."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.scopes import inside_current, stack_parts
from jaxmp._jaxpr.types import Array, Eqn
from jaxmp.casting.islands._islands import Island, is_elementwise
from jaxmp.casting.islands._label_gather import bind_with_picks, has_pick
from jaxmp.casting.islands._residuals import largest_small
from jaxmp.casting.islands._softmax import Softmax, run_softmax
from jaxmp.casting.ops import _registry
from jaxmp.casting.plan.plan import LAYER_REASON, EqnPlan, JaxprPlan
from jaxmp.casting.plan.states import FLOAT32
from jaxmp.casting.run._equal_islands import common_scope, signature
from jaxmp.casting.run._lookup import look_up
from jaxmp.casting.run._many_devices import sum_apart
from jaxmp.casting.run._named_scopes import region_of, region_of_island
from jaxmp.casting.run._recompute import recomputed
from jaxmp.casting.run._repeated import repeated
from jaxmp.casting.run._scatter import is_retyped_scatter, scatter
from jaxmp.casting.run._values import Values, cast
from jaxmp.casting.run._wide_gradients import Weight, multiply
from jaxmp.casting.run._wide_matmul import multiply_wide
from jaxmp.quantization.matmul import multiply as multiply_quantized


class Executor:
    """Runs plans.

    Values are kept in the dtype of their state and cast where an equation reads them.
    The cast is made for each reader anew: the cotangents of a float32 value are then
    summed in float32, and XLA merges the casts.

    With `named_scopes`, name stacks tell what is computed in which dtype. Custom
    derivative rules are traced when they are needed, under what `around_rules` enters.
    """

    def __init__(
        self,
        named_scopes: bool,
        around_rules: Callable[[], Any] = contextlib.nullcontext,
    ):
        self.named_scopes = named_scopes
        self.around_rules = around_rules
        self._islands: dict[Any, Callable[..., list[Any]]] = {}

    def run(
        self, plan: JaxprPlan, consts: Sequence[Any], args: Sequence[Any]
    ) -> list[Any]:
        """Runs a plan.

        Args:
          plan: the plan of a jaxpr.
          consts: values of the jaxpr's constants.
          args: values of its inputs, in the dtypes of `plan.in_states`.

        Returns:
          The outputs, in the dtypes of `plan.out_states`.
        """
        env = Values()
        env.write(plan.jaxpr.constvars, consts)
        env.write(plan.jaxpr.invars, args)
        for step in plan.steps:
            if isinstance(step, Island):
                self.run_island(step, env)
            else:
                env.write(step.eqn.outvars, self.run_eqn(step, env))
        return [
            env.read(v, state and state.dtype)
            for v, state in zip(plan.jaxpr.outvars, plan.out_states, strict=True)
        ]

    def closed(self, plan: JaxprPlan, consts: Sequence[Any]) -> Any:
        """The jaxpr that running a plan gives, made once per plan."""
        if "closed" not in plan.cache:
            avals = [
                v.aval if state is None else aval_at(v.aval, state.dtype)
                for v, state in zip(plan.jaxpr.invars, plan.in_states, strict=True)
            ]

            def run(*args: Array) -> list[Array]:
                return self.run(plan, consts, args)

            plan.cache["closed"] = jax.make_jaxpr(run)(*avals)
        return plan.cache["closed"]

    def run_eqn(self, plan: EqnPlan, env: Values) -> list[Any]:
        """Binds one equation; its results have the dtypes of their states."""
        region = region_of(plan) if self.named_scopes else ()
        outs = self.bind(plan, env, region=region)
        return [
            x if state is None else cast(x, state.dtype)
            for x, state in zip(outs, plan.out_states, strict=True)
        ]

    def bind(
        self,
        plan: EqnPlan,
        env: Values,
        in_island: bool = False,
        depth: int = 0,
        region: tuple[Any, ...] = (),
    ) -> list[Any]:
        """Binds one equation under its name, source line and context.

        The outermost `depth` of its name scopes have been entered by the caller.
        """
        eqn = plan.eqn
        stack = inside_current(stack_parts(eqn)[depth:] + region)
        traceback = eqn.source_info.traceback
        with source_info_util.user_context(traceback, name_stack=stack):
            # Copies that others share belong to no single equation's context.
            halves = self.copies_in_half(plan, env)
            with eqn.ctx.manager:
                return self.carry_out(plan, env, halves, in_island)

    def copies_in_half(self, plan: EqnPlan, env: Values) -> dict[int, Any]:
        """The operands that an equation reads in half without a gradient there."""
        eqn, (state, *_) = plan.eqn, (*plan.out_states, None)
        if plan.is_lookup and state is not None:
            return {0: env.half(eqn.invars[0], state.dtype)}
        invars, _ = env.copies.without_transposes(eqn, eqn.params)
        return {i: env.half(invars[i], plan.in_dtypes[i]) for i in plan.weights}

    def carry_out(
        self, plan: EqnPlan, env: Values, halves: dict[int, Any], in_island: bool
    ) -> list[Any]:
        """Reads the operands of an equation in their dtypes, and binds it."""
        eqn = plan.eqn
        if plan.is_lookup:
            table, *rest = eqn.invars
            return [look_up(eqn, halves[0], env.get(table), [*map(env.get, rest)])]
        params = eqn.params if plan.params is None else plan.params
        invars, params = env.copies.without_transposes(eqn, params)
        # A layer widens its input once: its gradient is added up in float32.
        is_layer = plan.reason.startswith(LAYER_REASON)
        read = env.read_once if is_layer else env.read
        operands = []
        for i, (v, dtype) in enumerate(zip(invars, plan.in_dtypes, strict=True)):
            if i in halves:
                operands.append(halves[i])
            elif i in plan.repeats:
                operands.append(repeated(env.get(v), eqn.outvars[0].aval, dtype))
            else:
                operands.append(read(v, dtype))
        if plan.call is not None:
            rule = _registry.call_rule(eqn.primitive.name)
            return list(rule.execute(plan, operands, self))
        if plan.quantizing is not None and plan.recipe is not None:
            stored = {i: env.weight(invars[i]) for i in plan.weights}
            return [_multiply_quantized(plan, params, operands, stored)]
        if plan.weights:
            weights = {i: env.weight(invars[i]) for i in plan.weights}
            return [multiply(eqn.primitive, params, operands, weights)]
        results = self.bind_operands(plan, env, params, operands, in_island)
        env.copies.note_transpose(eqn)
        env.note_gather(plan)
        return [*map(sum_apart, results)] if plan.is_apart else results

    def bind_operands(
        self,
        plan: EqnPlan,
        env: Values,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        in_island: bool,
    ) -> list[Any]:
        """Binds an equation that is not a call to operands in their dtypes."""
        eqn = plan.eqn
        if _is_done_cast(eqn, params, operands):
            if not is_literal(eqn.invars[0]):
                env.copies.note_cast(eqn, operands[0], env.get(eqn.invars[0]))
            return list(operands)
        if copy := env.copies.claim_cast(eqn):
            return copy
        if in_island and has_pick(eqn):
            return bind_with_picks(eqn, operands)
        if is_retyped_scatter(eqn, operands):
            return [scatter(eqn, operands)]
        if plan.is_wide:
            return [multiply_wide(eqn.primitive, params, operands)]
        bind_params = eqn.primitive.get_bind_params(params)
        outs = eqn.primitive.bind(*operands, **bind_params)
        return list(outs) if eqn.primitive.multiple_results else [outs]

    def run_island(self, island: Island, env: Values) -> None:
        """Runs the operations of an island as one function of its stored inputs."""
        common = common_scope(island)
        depth = len(common)
        region = region_of_island(island) if self.named_scopes else ()
        with source_info_util.set_name_stack(inside_current(common + region)):
            if island.softmax is not None:
                self.run_softmax(island, island.softmax, env, depth)
                return
            args = [env.get(v) for v in island.inputs]
            run = functools.partial(self._run_members, island, depth)
            if island.recompute:
                key = signature(island, depth, args)
                limit = largest_small(args)
                run = recomputed(run, is_elementwise(island), limit)
                run = run if key is None else self._islands.setdefault(key, run)
            outs = run(*args)
        for (v, dtype), value in zip(island.outputs, outs, strict=True):
            env.write_at(v, dtype, value)

    def _run_members(self, island: Island, depth: int, *args: Any) -> list[Any]:
        inside = Values()
        inside.write(island.inputs, [_widen(x) for x in args])
        for plan in island.members:
            outs = self.bind(plan, inside, in_island=island.recompute, depth=depth)
            inside.write(plan.eqn.outvars, outs)
        return [inside.read(v, dtype) for v, dtype in island.outputs]

    def run_softmax(
        self, island: Island, softmax: Softmax, env: Values, depth: int
    ) -> None:
        """Runs an island that is one softmax, keeping its half result only."""
        ((result, dtype),) = island.outputs

        def bind(softmax: Softmax, scores: Array, shift: Array) -> Array:
            inside = Values()
            inside.write([softmax.scores], [scores])
            if not is_literal(softmax.shift):
                inside.write([softmax.shift], [shift])
            for plan in softmax.members:
                outs = self.bind(plan, inside, depth=depth)
                inside.write(plan.eqn.outvars, outs)
            return inside.read(result, None)

        scores = env.read(softmax.scores, FLOAT32)
        shift = env.read(softmax.shift, FLOAT32)
        value = run_softmax(softmax, bind, scores, shift, dtype)
        env.write_at(result, dtype, value)


def _multiply_quantized(
    plan: EqnPlan,
    params: Mapping[str, Any],
    operands: Sequence[Any],
    stored: Mapping[int, Weight],
) -> Any:
    """A matmul in the format of its recipe."""
    (result,) = plan.out_states
    assert result is not None
    assert plan.quantizing is not None
    assert plan.recipe is not None
    lhs, rhs = operands
    return multiply_quantized(
        lhs,
        rhs,
        params["dimension_numbers"],
        plan.recipe,
        plan.quantizing.roles,
        stored,
        result.dtype,
    )


def _widen(x: Any) -> Any:
    is_half = jnp.result_type(x) in (jnp.float16, jnp.bfloat16)
    return jax.lax.convert_element_type(x, FLOAT32) if is_half else x


def _is_done_cast(eqn: Eqn, params: Mapping[str, Any], operands: Sequence[Any]) -> bool:
    return (
        eqn.primitive.name == CAST
        and jnp.result_type(operands[0]) == params["new_dtype"]
    )


def aval_at(aval: Any, dtype: np.dtype) -> Any:
    """An abstract value in another dtype, strongly typed."""
    return aval.update(dtype=dtype, weak_type=False)
