"""Rules of the user's, what wins over what, registered primitives, and `explain`."""

import contextlib
import dataclasses
import logging.handlers
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend import core as jex_core
from jax.extend.core import primitives
from jax.interpreters import mlir

import jaxmp
from jaxmp.casting import OpRule
from jaxmp.casting.ops._op_lists import CLASS_OF, table_as_markdown
from jaxmp.errors import (
    AutocastError,
    AutocastRuleError,
    NoSuchRows,
    RuleAlreadyRegistered,
)
from jaxmp.testing import equations, matmuls
from tests.support.functions import example_arguments

W, X = example_arguments()
F32, BF16 = "float32", "bfloat16"


def network(w, x):
    with jax.named_scope("block_0"), jax.named_scope("attention"):
        x = x @ w
    with jax.named_scope("block_1"):
        x = projection(w, x)
    return jnp.tanh(x @ w)


def projection(w, x):
    return x @ w


def dtypes(*rules, fn=network):
    jaxpr = jax.make_jaxpr(jaxmp.autocast(fn, rules=rules))(W, X)
    return [str(m.output) for m in matmuls(jaxpr)]


def test_rules_by_path_function_and_primitive():
    assert dtypes() == [BF16, BF16, BF16]
    assert dtypes(OpRule(path="block_0", compute=F32)) == [F32, BF16, BF16]
    assert dtypes(OpRule(path="block_.", compute=F32)) == [F32, F32, BF16]
    assert dtypes(OpRule(path="block_0/att.*", compute=F32)) == [F32, BF16, BF16]
    assert dtypes(OpRule(function="projection", compute=F32)) == [BF16, F32, BF16]
    assert dtypes(OpRule(primitive="dot_general", compute=F32)) == [F32] * 3


def test_the_first_rule_wins():
    half = OpRule(path="block_0", compute=BF16)
    full = OpRule(primitive="dot_general", compute=F32)
    assert dtypes(half, full) == [BF16, F32, F32]


def test_rules_reach_into_calls():
    def fn(w, x):
        return jax.lax.scan(lambda h, _: (jax.jit(network)(w, h), None), x, None, 2)[0]

    assert dtypes(OpRule(path="block_1", compute=F32), fn=fn) == [BF16, F32, BF16]


def test_a_rule_lowers_what_the_lists_keep():
    rule = OpRule(primitive="tanh", compute=BF16)
    jaxpr = jax.make_jaxpr(jaxmp.autocast(network, rules=[rule]))(W, X)
    tanh = [e for e in jaxpr.eqns if e.primitive.name == "tanh"]
    assert str(tanh[0].outvars[0].aval.dtype) == BF16


def test_full_precision_wins_over_rules():
    def fn(w, x):
        return jaxmp.full_precision(lambda w, x: x @ w)(w, x) @ w

    assert dtypes(OpRule(primitive="dot_general", compute=BF16), fn=fn) == [F32, BF16]


def test_the_inner_autocast_wins():
    inner = jaxmp.autocast(lambda w, x: x @ w, "float32")
    assert dtypes(fn=lambda w, x: inner(w, x) @ w) == [F32, BF16]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([OpRule(path="nowhere", compute=F32)], "matches no operation"),
        ("block_0", "not a sequence of rules"),
        ([3], "is not a rule"),
        ([jaxmp.PolicyRule(kind="norm", compute=F32)], "kind"),
    ],
)
def test_rules_that_cannot_work_are_errors(rules, words):
    with pytest.raises(AutocastRuleError, match=words):
        jaxmp.autocast(network, rules=rules)(W, X)


def test_policy_rules_with_a_path_are_taken():
    assert dtypes(jaxmp.PolicyRule(path="block_0", compute=F32)) == [F32, BF16, BF16]


def test_what_is_no_function_or_no_dtype_for_it():
    with pytest.raises(AutocastError, match="takes a function"):
        jaxmp.autocast(3)
    with pytest.raises(AutocastError, match="float64"):
        jaxmp.autocast(network, "64-true")


norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))


def test_an_nnx_module_that_is_no_argument_is_refused():
    with pytest.raises(AutocastError, match="closes over 'norm'"):
        jaxmp.autocast(lambda x: norm(x))


def test_an_attribute_may_have_the_name_of_a_module():
    jaxmp.autocast(lambda x: x / jnp.linalg.norm(x))(W)


def test_registering_a_primitive():
    twice_p = jex_core.Primitive("test_twice_as_float32")
    twice_p.def_impl(lambda x: x * 2)
    twice_p.def_abstract_eval(lambda x: x)
    mlir.register_lowering(twice_p, mlir.lower_fun(lambda x: x * 2, False))

    def fn(w, x):
        return twice_p.bind(x @ w) @ w

    def after():
        rows = jaxmp.explain(fn)(W, X).rows
        return next(r.after for r in rows if r.operation == twice_p.name)

    assert after() == "f32 -> f32"
    jaxmp.register_rule(twice_p, "follow")
    assert after() == "bf16 -> bf16"
    with pytest.raises(RuleAlreadyRegistered, match="twice"):
        jaxmp.register_rule(twice_p, "full")


def test_matmul_precision_changes_only_the_algorithm():
    def fn(x, w):
        return x @ w

    jaxpr = jax.make_jaxpr(jaxmp.autocast(fn, "float32,matmul=tf32"))(X, W)
    high = jax.lax.Precision.HIGH
    assert jaxpr.eqns[0].params["precision"] == (high, high)
    assert str(matmuls(jaxpr)[0].output) == F32


def test_explain_shows_rows_summary_and_page(tmp_path):
    told = jaxmp.explain(network, rules=[OpRule(path="block_0", compute=F32)])(W, X)
    first = told.rows[0]
    assert first.operation == "dot_general"
    assert first.path == "block_0/attention"
    assert first.before == "f32 f32 -> f32"
    assert first.source.startswith("test_rules_and_explain.py")
    assert "block_0" in first.reason
    assert told.half_flops == pytest.approx(2 / 3)
    assert told.residual_bytes["bfloat16"] > 0
    assert str(told).splitlines()[0] == told.summary
    told.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<tr") == len(told.rows) + 1
    assert "http" not in page


def test_explain_names_the_cause_and_what_it_costs():
    def fn(w, x):
        x = 2 * x.astype(jnp.bfloat16).astype(jnp.float32)  # the cause
        x = jax.jit(lambda w, x: x @ w)(w, x)
        x = jnp.dot(x, w, precision="highest")
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=2)[0]

    lines = pathlib.Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.endswith("# the cause"))
    told = jaxmp.explain(fn)(W, X)
    cast, precision = told.reasons
    assert cast.reason == "cast to float32 by the program"
    assert f":{line} (" in cast.source
    assert f":{line + 2} (" in precision.source
    assert told.half_flops == 0.5
    assert [cast.flops, cast.matmuls] == [told.matmul_flops / 4, 1]
    assert not str(told).startswith("Warning")
    assert f"25.0% of the FLOPs, 1 matmul, not in half: {cast.reason}" in str(told)
    kept = told.only("float32 matmuls").rows
    assert [row.operation for row in kept] == ["dot_general", "dot_general"]
    assert [row.full_flops for row in kept] == [cast.flops, precision.flops]
    assert len(told.only("matmuls").rows) == 3
    with pytest.raises(NoSuchRows, match="'float32 matmuls'"):
        told.only("slow ones")


def test_explain_warns_first_when_little_is_in_half():
    def fn(w, x):
        return jaxmp.full_precision(jax.jit(lambda x: jnp.tanh(x @ w) @ w))(x) @ w

    told = jaxmp.explain(fn)(W, X)
    assert str(told).startswith("Warning: only 33% of the matmul FLOPs are in half.")
    (row,) = told.only("float32 matmuls").rows
    assert row.operation.startswith("jit")
    assert told.reasons[0].reason == "full_precision"
    assert told.reasons[0].matmuls == 2
    assert "Warning" not in str(jaxmp.explain(fn, "float32")(W, X))


def test_explain_takes_abstract_arguments():
    shapes = jax.eval_shape(lambda *a: a, W, X)
    assert jaxmp.explain(network)(*shapes).rows == jaxmp.explain(network)(W, X).rows


def test_arguments_that_are_no_arrays_stay_what_they_are():
    @jaxmp.autocast(policy="mixed_bfloat16")
    def fn(tree, mode, scale, *, flag):
        assert (flag, mode) == (True, "x")
        return {"y": tree["w"] @ tree["w"] * scale, "none": tree["n"]}

    tree = {"w": np.asarray(W), "n": None}
    for _ in range(3):
        assert fn(tree, "x", 2.5, flag=True)["none"] is None
    assert fn(tree, "x", 1, flag=True)["y"].dtype == jnp.float32


def test_an_eager_call_sees_what_its_function_closes_over_as_it_is_now():
    closed = {"w": jnp.ones((4, 4)), "scale": 2.0}
    compilations = []

    @jaxmp.autocast
    def fn(x):
        def body(carry, _):
            return jnp.tanh(carry @ closed["w"]) * closed["scale"], None

        return lax.scan(body, x, None, length=3)[0].sum()

    def expected(x):
        for _ in range(3):
            x = jnp.tanh(x @ closed["w"]) * closed["scale"]
        return x.sum()

    x = jnp.ones((2, 4))
    changes = ({}, {}, {"w": 0.1 * jnp.eye(4)}, {"scale": 3.0}, {"scale": 2.0})
    for change in changes:
        closed.update(change)
        with jax.log_compiles(), _count(compilations):
            np.testing.assert_allclose(fn(x), expected(x), rtol=0.05)
    assert compilations == [1, 0, 0, 1, 0]


@contextlib.contextmanager
def _count(counts):
    """Appends how many eager autocasts are compiled meanwhile."""
    handler = logging.handlers.BufferingHandler(10**6)
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    messages = [record.getMessage() for record in handler.buffer]
    counts.append(
        sum("Finished XLA compilation of jit(autocasted" in m for m in messages)
    )


@pytest.mark.parametrize("rules", [(), (OpRule(path="late", compute="float32"),)])
def test_an_eager_call_sees_the_scopes_that_it_is_traced_under_now(rules):
    """They are no part of what is computed, and decide in which dtype it is."""
    w, x = jnp.full((4, 4), 1.001), jnp.full((2, 4), 1.001)
    is_marked = iter((False, True, False))

    def fn(w, x):
        if not next(is_marked):
            return x @ w
        if not rules:
            return jaxmp.full_precision(lambda w, x: x @ w)(w, x)
        with jax.named_scope("late"):
            return x @ w

    rules = tuple(dataclasses.replace(rule, allow_unused=True) for rule in rules)
    cast = jaxmp.autocast(fn, rules=rules)
    values = [float(cast(w, x)[0, 0]) for _ in range(3)]
    assert values == [4.0, float((x @ w)[0, 0]), 4.0]


def test_an_eager_call_calls_the_callback_that_it_was_given():
    def offset_by(n):
        def callback(x):
            return np.asarray(x + n, np.float32)

        return lambda x: jax.pure_callback(callback, x, x)

    offsets = iter((1.0, 2.0))
    fn = jaxmp.autocast(lambda x: offset_by(next(offsets))(x))
    assert [float(fn(jnp.float32(0))) for _ in range(2)] == [1.0, 2.0]


def test_only_what_was_closed_over_is_traced_too():
    np.testing.assert_allclose(
        jax.grad(lambda w: jaxmp.autocast(lambda x: (x @ w).sum())(X))(W),
        jax.grad(lambda w: (X @ w).sum())(W),
        atol=0.05,
    )


def test_the_documented_lists_are_those_of_the_table():
    path = pathlib.Path(__file__).parents[2] / "docs" / "op_lists.md"
    assert table_as_markdown() in path.read_text()


# Of integers, of effects, or calls, which rules of their own describe.
WITHOUT_OPINION = """
  and or xor not shift_left shift_right_logical shift_right_arithmetic clz mulhi
  population_count reduce_and reduce_or reduce_xor axis_index select_and_scatter
  after_all create_token device_put dce_sink empty2 get swap
  call closed_call eval_jaxpr jit cond while scan remat2 custom_jvp_call custom_vjp_call
  custom_linear_solve stage
"""


def test_every_public_primitive_that_computes_has_a_line_in_the_table():
    public = {**vars(lax), **vars(primitives)}
    names = {p.name for name, p in public.items() if name.endswith("_p")}
    assert len(names) > 150
    assert names - CLASS_OF.keys() <= set(WITHOUT_OPINION.split())


@pytest.mark.parametrize("segment", [jax.ops.segment_max, jax.ops.segment_min])
def test_extrema_of_segments_run_in_half_between_matmuls_and_agree(segment):
    def extrema(w, x):
        return segment(x @ w, jnp.arange(len(x)) // 2, len(x) // 2) @ w

    def by_hand(w, x):
        with jax.numpy_dtype_promotion("standard"):
            return extrema(w.astype(BF16), x.astype(BF16)).astype(F32)

    cast = jaxmp.autocast(extrema, "mixed_bfloat16")
    (scatter,) = (
        eqn
        for _, eqn in equations(jax.make_jaxpr(cast)(W, X))
        if eqn.primitive.name.startswith("scatter")
    )
    assert scatter.outvars[0].aval.dtype == BF16
    np.testing.assert_allclose(cast(W, X), by_hand(W, X), atol=0.01)
    found, wanted = (
        jax.grad(lambda w, f=f: jnp.sum(f(w, X)))(W) for f in (cast, by_hand)
    )
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def small_steps(w, x):
    def step(h, _):
        return h + 0.01 * jnp.tanh(h @ w), None

    return lax.scan(step, x, length=20)[0] @ w


def running_sum(w, x):
    def step(total, x):
        return total + jnp.outer(x, x @ w), x @ total

    return lax.scan(step, jnp.zeros_like(w), x)[1] @ w


def forever(w, x):
    def body(state):
        i, h = state
        return i + 1, h + jnp.tanh(h @ w)

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


@pytest.mark.parametrize(
    ("fn", "carry", "primitive"),
    [
        (small_steps, F32, "scan"),
        (running_sum, BF16, "scan"),
        (forever, BF16, "while"),
    ],
)
def test_a_rule_decides_what_loops_carry(fn, carry, primitive):
    def carried(rules):
        told = jaxmp.explain(fn, rules=rules)(W, X)
        assert told.half_flops == 1.0
        jaxpr = jax.make_jaxpr(jaxmp.autocast(fn, rules=rules))(W, X)
        (loop,) = [e for _, e in equations(jaxpr) if e.primitive.name == primitive]
        return str(loop.outvars[-1 if primitive == "while" else 0].aval.dtype)

    assert carried([]) != carry
    assert carried([OpRule(primitive=primitive, carry=carry)]) == carry
    assert carried([OpRule(function=fn.__name__, carry=carry)]) == carry


def test_rules_for_carries_that_decide_nothing_are_refused():
    with pytest.raises(AutocastRuleError, match="has to set one dtype"):
        OpRule(primitive="scan")
    with pytest.raises(AutocastRuleError, match="has to set one dtype"):
        OpRule(primitive="scan", compute=F32, carry=F32)
    with pytest.raises(AutocastRuleError, match="Write carry='bfloat16'"):
        jaxmp.autocast(network, rules=[OpRule(primitive="scan", carry="float16")])
    unused = jaxmp.autocast(network, rules=[OpRule(primitive="scan", carry=F32)])
    with pytest.raises(AutocastRuleError, match="matches no operation"):
        unused(W, X)
