"""What jaxmp takes for granted of JAX beyond its public interface, one by one.

All of it is held by `jaxmp/_jaxpr`. A test that fails here names what the installed JAX
does otherwise, and the title above it the file to change. Name stacks and tracebacks
are in `test_assumptions_of_sources.py`, names of primitives in
`test_assumptions_of_primitives.py`, and Flax in `test_assumptions_of_flax.py`.
"""

import functools
import importlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from jaxmp._jaxpr import calls, lowered, rewrite, tracers
from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.residuals import residual_jaxpr
from jaxmp._jaxpr.sources import written
from jaxmp._jaxpr.versions import (
    CUDNN_ATTENTION,
    jaxpr_consts,
    open_jaxpr,
    shard_map_arguments,
)
from jaxmp._jaxpr.walk import walk
from tests.support.equations import equation

X = jnp.ones((4, 3))


def shapes(atoms):
    return [atom.aval.shape for atom in atoms]


def double(x):
    return x * 2


# Jaxprs (versions, atoms)


def test_a_jaxpr_has_equations_inputs_outputs_and_constants():
    constant = jnp.arange(3.0)
    closed = jax.make_jaxpr(lambda x: x @ constant)(X)
    opened = open_jaxpr(closed)
    assert [e.primitive.name for e in opened.eqns] == ["dot_general"]
    assert (shapes(opened.invars), shapes(opened.outvars)) == ([(4, 3)], [(4,)])
    assert shapes(opened.constvars) == [(3,)]
    np.testing.assert_array_equal(jaxpr_consts(closed), [constant])


def test_a_number_in_an_equation_is_a_literal_with_a_value():
    literals = [v for v in equation("mul", double, X).invars if is_literal(v)]
    assert [float(literal.val) for literal in literals] == [2.0]
    assert literals[0].aval.dtype == jnp.float32


# Calls (calls)


def solved(x):
    return lax.custom_linear_solve(
        lambda v: v * 2, x, lambda mv, b: b / 2, lambda mv, b: b / 2
    )


def test_several_jaxprs_of_an_equation_stand_in_one_tuple():
    branches = equation("cond", lambda x: lax.cond(True, jnp.sin, jnp.cos, x), X)
    assert len(calls.held(branches)) == 2, branches.params
    solve = equation("custom_linear_solve", solved, X)
    assert len(calls.held(solve)) == 4, solve.params


@jax.custom_jvp
def with_jvp(x):
    return x * 2


@with_jvp.defjvp
def its_jvp(primals, tangents):
    return with_jvp(*primals), jnp.sin(tangents[0])


@jax.custom_vjp
def with_vjp(x):
    return x * 2


with_vjp.defvjp(lambda x: (x * 2, None), lambda _, dy: (dy * 2,))

CALLS = {
    "jit": (jax.jit(double), calls.JITS),
    "checkpoint": (jax.checkpoint(double), calls.CHECKPOINTS),
    "custom_jvp": (with_jvp, calls.CUSTOM_JVPS),
    "custom_vjp": (with_vjp, calls.CUSTOM_VJPS),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_holds_one_jaxpr_of_its_operands(name):
    fn, names = CALLS[name]
    eqn = equation(names, fn, X)
    inside = eqn.params.get(calls.BODY[eqn.primitive.name])
    assert inside is not None, f"{eqn.primitive} now holds {sorted(eqn.params)}"
    assert calls.body(eqn) is inside
    assert [e.primitive.name for e in open_jaxpr(inside).eqns] == ["mul"]


def closing_over(value, x):
    @jax.custom_jvp
    def fn(x):
        return x * value

    fn.defjvp(lambda primals, tangents: (fn(*primals), tangents[0]))
    return fn(x)


def test_a_custom_call_takes_what_its_function_closes_over_first():
    eqn = equation(calls.CUSTOM_JVPS, closing_over, jnp.ones(()), X)
    assert eqn.params["num_consts"] == 1, sorted(eqn.params)
    assert shapes(eqn.invars) == [(), X.shape]


@pytest.mark.parametrize("name", ["closed_call_p", "call_p"])
def test_a_group_of_equations_has_one_of_these_names(name):
    assert getattr(jax.extend.core.primitives, name).name in calls.GROUPINGS


def test_a_scan_takes_constants_then_carries_then_slices():
    def fn(const, carry, xs):
        return lax.scan(lambda c, x: (c + const.sum(), 2 * x), carry, xs)

    eqn = equation("scan", fn, jnp.ones(2), jnp.ones(3), jnp.ones((7, 5)))
    scan = calls.loop(eqn)
    parts = [shapes(part) for part in scan.split(eqn.invars)]
    assert parts == [[], [(2,)], [(3,)], [(7, 5)]], sorted(eqn.params)
    assert shapes(open_jaxpr(scan.body).invars) == [(2,), (3,), (5,)]
    assert shapes(scan.carried()) == [(3,)]
    assert shapes(eqn.outvars) == [(3,), (7, 5)]
    assert scan.length == 7


def test_a_while_takes_the_constants_of_its_condition_then_of_its_body_then_carries():
    def fn(limit, step, carry):
        return lax.while_loop(
            lambda c: c.sum() < limit.sum(), lambda c: c + step.sum(), carry
        )

    eqn = equation("while", fn, jnp.ones(2), jnp.ones(5), jnp.ones(3))
    loop = calls.loop(eqn)
    parts = [shapes(part) for part in loop.split(eqn.invars)]
    assert parts == [[(2,)], [(5,)], [(3,)], []], sorted(eqn.params)
    assert shapes(open_jaxpr(loop.condition).invars) == [(2,), (3,)]
    assert shapes(open_jaxpr(loop.body).invars) == [(5,), (3,)]
    assert shapes(eqn.outvars) == [(3,)]


def test_a_cond_takes_an_index_and_the_operands_of_every_branch():
    def fn(pred, x, y):
        return lax.cond(pred, lambda x, y: x + y.sum(), lambda x, y: x * y.sum(), x, y)

    eqn = equation("cond", fn, True, jnp.ones(2), jnp.ones(3))
    assert shapes(eqn.invars) == [(), (2,), (3,)], sorted(eqn.params)
    assert eqn.invars[0].aval.dtype == jnp.int32
    if_false, if_true = calls.branches(eqn)
    assert shapes(open_jaxpr(if_false).invars) == [(2,), (3,)]
    assert "mul" in [e.primitive.name for e in walk(if_false)]
    assert "add" in [e.primitive.name for e in walk(if_true)]


def sharded():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": P("i"), "out_specs": P("i")}
    return jax.shard_map(lambda x: x * lax.psum(x, "i"), mesh=mesh, **specs)


@pytest.mark.devices(2)
def test_a_shard_map_can_be_called_again_with_its_parameters():
    eqn = equation("shard_map", sharded(), X)
    arguments = shard_map_arguments(eqn.params)
    again = jax.shard_map(lambda x: (x * lax.psum(x, "i"),), **arguments)
    np.testing.assert_array_equal(jax.jit(again)(X)[0], sharded()(X))
    assert dict(eqn.params["mesh"].shape) == {"i": 2}
    assert set(eqn.params["newly_manual_axes"]) == {"i"}


def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2


def doubled_by_pallas(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)


def not_a_sum(a, b):
    return a + 2 * b


def reduced(x):
    return lax.reduce(x, 0.0, not_a_sum, (0,))


def reduced_by_window(x):
    return lax.reduce_window(x, 0.0, not_a_sum, (1, 2), (1, 1), "SAME")


HOLDERS = {
    "pallas_call": (doubled_by_pallas, calls.KERNELS),
    "run_state": (pl.run_state(lambda ref: kernel(ref, ref)), calls.KERNELS),
    "reduce": (reduced, calls.REDUCERS),
    "reduce_window": (reduced_by_window, calls.REDUCERS),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_kernels_and_reductions_hold_a_jaxpr_that_is_not_a_call(name):
    fn, names = HOLDERS[name]
    eqn = equation(names, fn, X)
    assert calls.held(eqn), sorted(eqn.params)
    assert calls.body(eqn) is None
    assert calls.bodies(eqn) == []


@pytest.mark.parametrize("fn", [jnp.negative, jax.jit(double), with_jvp, with_vjp])
def test_an_equation_can_be_carried_out_again(fn):
    (eqn,) = open_jaxpr(jax.make_jaxpr(fn)(X)).eqns
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(X, **params)
    result = outs[0] if eqn.primitive.multiple_results else outs
    np.testing.assert_array_equal(result, fn(X))


# Custom derivative rules (rewrite)


@pytest.mark.parametrize("fn", [with_jvp, with_vjp])
def test_the_parameters_that_hold_custom_rules_can_be_wrapped(fn):
    eqn = equation(rewrite._RULES, fn, X)
    for name in rewrite._RULES[eqn.primitive.name]:
        rule = eqn.params.get(name)
        assert rule is not None, f"{eqn.primitive} now holds {sorted(eqn.params)}"
        assert hasattr(rule, "wrap"), f"{name} is now a {type(rule)}"


def test_the_name_of_a_custom_rule_s_function_is_in_its_debug_info():
    inside = calls.body(equation(calls.CUSTOM_JVPS, with_jvp, X))
    assert open_jaxpr(inside).debug_info.func_name == "with_jvp"


def test_equations_and_jaxprs_are_replaced_by_a_method():
    def negated(eqn):
        is_multiplied = eqn.primitive.name == "mul"
        return eqn.replace(primitive=lax.sub_p, params={}) if is_multiplied else eqn

    changed = rewrite.map_equations(jax.make_jaxpr(lambda x: x * 2.0)(X), negated)
    (result,) = jax.extend.core.jaxpr_as_fun(changed)(X)
    np.testing.assert_array_equal(result, X - 2)


@pytest.mark.parametrize(
    ("change", "function"),
    [(lambda jaxpr: jaxpr, "caller"), (rewrite.with_lines_of_custom_rules, "its_jvp")],
)
def test_a_rule_is_traced_under_the_line_of_its_call_or_its_own(change, function):
    def caller(x):
        return with_jvp(x)

    fn = jax.extend.core.jaxpr_as_fun(change(jax.make_jaxpr(caller)(X)))
    sine = equation("sin", lambda x: jax.jvp(fn, (x,), (x,)), X)
    line = written(sine.source_info.traceback).source
    assert line.function.endswith(function), line


# Residuals and lowered programs (residuals, lowered)


def test_a_pullback_is_a_tree_whose_leaves_are_the_residuals():
    kept = jax.tree.leaves(jax.vjp(lambda x: jnp.sin(x) * 2, X)[1])
    assert any(x.shape == X.shape and np.allclose(x, np.cos(1)) for x in kept)
    assert residual_jaxpr(jnp.sin, (X,), {}) is not None


def test_a_lowered_function_names_the_arguments_that_it_kept():
    program = jax.jit(lambda x, unused, y: x + y).lower(X, X, X)
    assert list(lowered.kept_arguments(program)) == [0, 2]


def test_the_module_of_a_lowered_function_can_be_replaced():
    program = jax.jit(lambda x: x + 1).lower(X)
    other = jax.jit(lambda x: x * 5).lower(X).compiler_ir("stablehlo")
    compiled = lowered.with_module(program, other).compile()
    np.testing.assert_array_equal(compiled(X), X * 5)


def test_mlir_merges_equal_operations_of_a_module():
    def fn(x):
        return jnp.sin(x) + jnp.sin(x)

    module = jax.jit(fn).lower(X).compiler_ir("stablehlo")
    assert str(module).count("stablehlo.sine") == 2
    lowered.merge_common_subexpressions(module)
    assert str(module).count("stablehlo.sine") == 1


# Tracers (tracers)


def test_a_traced_value_knows_the_equation_that_made_it_and_its_inputs():
    @jax.make_jaxpr
    def fn(x):
        y = jnp.sin(x)
        assert (tracers.is_input(x), tracers.is_input(y)) == (True, False), vars(x)
        found = tracers.recorded(y)
        assert found is not None, f"a {type(y)} without its equation"
        assert found.name == "sin"
        assert tracers.same_value(found.inputs[0], x)
        assert tracers.recorded(found.inputs[0]) is None
        return y

    fn(X)


@pytest.mark.parametrize("call", [jax.jit, jax.checkpoint])
def test_a_value_that_a_call_made_is_followed_inside(call):
    @jax.make_jaxpr
    def fn(x):
        found = tracers.recorded(call(lambda x: jnp.sin(x) * 2)(x))
        assert found.name == "mul"
        (sine,) = (tracers.recorded(x) for x in found.inputs)
        assert sine.name == "sin"
        return x

    fn(X)


def test_a_differentiated_value_carries_its_tangent():
    def fn(x):
        y = jnp.sin(x)
        tangent = tracers.recorded_tangent(y)
        assert tangent is not None, f"a {type(y)} without its tangent"
        assert tangent.aval.shape == y.shape
        assert tracers.recorded(tangent).name == "mul"
        assert tracers.sources(tangent) is not None
        return y.sum()

    jax.make_jaxpr(jax.grad(fn))(X)


# Fused attention (versions)


def test_dot_product_attention_calls_cudnn_by_this_name(monkeypatch):
    module, _, name = CUDNN_ATTENTION.rpartition(".")
    shown = []

    def attention(query, *args, **kwargs):
        shown.append(query.shape)
        return query

    monkeypatch.setattr(importlib.import_module(module), name, attention)
    q = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    jax.eval_shape(attend, q, q, q)
    assert shown == [q.shape]
