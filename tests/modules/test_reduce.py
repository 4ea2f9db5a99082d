"""`reduce=float32` under `apply_policy`: by policy, by rule, and in what is shown."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp.errors import JaxmpError, UnusedRule
from jaxmp.testing import matmuls, zoo
from tests.modules.conftest import FAST_COMPILE, module_under
from tests.support.gradient_sources import gradient_sources

HALF, WIDE = "mixed_bfloat16", "mixed_bfloat16,reduce=float32"
FLOAT32 = jnp.dtype("float32")
X = jax.random.normal(jax.random.key(0), (2, 6, 8))
FEW = ("mlp", "encoder", "recommender")


def often(is_usual):
    """The networks of the zoo; a default run takes those for which it is true."""
    for model in zoo():
        yield model if is_usual(model) else pytest.param(model, marks=pytest.mark.slow)


@functools.cache
def problem(model, policy):
    """The loss of a network of the zoo under a policy, and its parameters."""
    apply, params, state = model.functional(module_under(model, policy))

    def loss(params):
        output, _ = apply(params, state, *model.inputs)
        return model.loss(output, model.target)

    return loss, params


@functools.cache
def traced(model, policy):
    loss, params = problem(model, policy)
    run = jax.grad(loss)
    return gradient_sources(run, params), matmuls(jax.make_jaxpr(run)(params))


def dtypes_by_weight(run, params):
    """The dtype in which each weight's gradient leaves its matmul."""
    found = gradient_sources(run, params)
    return {
        path: {eqn.outvars[0].aval.dtype.name for eqn in eqns}
        for path, eqns in found.items()
        if eqns
    }


@pytest.mark.parametrize(
    "model", [*often(lambda m: m.kind == "nnx" or m.name in FEW)], ids=str
)
def test_gradients_of_weights_leave_their_matmuls_in_float32(model):
    (sources, before), (wide, after) = traced(model, HALF), traced(model, WIDE)
    found = {id(eqn): eqn for eqns in wide.values() for eqn in eqns}
    assert found
    assert {eqn.outvars[0].aval.dtype for eqn in found.values()} == {FLOAT32}
    # As many as before, and every other matmul as before.
    counts = [{p: len(eqns) for p, eqns in s.items()} for s in (sources, wide)]
    assert counts[0] == counts[1]
    operands = [collections.Counter(m.operands for m in ms) for ms in (before, after)]
    assert operands[0] == operands[1]
    narrow = [sum(m.output != FLOAT32 for m in ms) for ms in (before, after)]
    assert narrow[0] - narrow[1] == len(found)


@pytest.mark.parametrize("model", [*often(lambda m: m.name in FEW)], ids=str)
def test_values_keep_their_bits(model):
    values = []
    for policy in (HALF, WIDE):
        loss, params = problem(model, policy)
        run = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)
        values.append(np.asarray(run(params)[0]).tobytes())
    assert values[0] == values[1]


@pytest.mark.parametrize("model", [m for m in zoo() if m.name in FEW], ids=str)
def test_a_reduce_dtype_in_half_changes_no_program(model):
    texts = []
    for policy in (HALF, f"{HALF},reduce=bfloat16"):
        loss, params = problem(model, policy)
        texts.append(jax.jit(jax.grad(loss)).lower(params).as_text())
    assert texts[0] == texts[1]


# Rules


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(8, name="up")(x))
        return nn.Dense(8, name="down")(x)


class Nnx(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def network(kind, policy, rules=()):
    """The loss of a small network under a policy and rules, and its parameters."""
    rules = (*rules, *jaxmp.default_rules)
    if kind == "linen":
        model = jaxmp.apply_policy(Linen(), policy, rules=rules)
        params = model.init(jax.random.key(0), X)["params"]
        return lambda p: model.apply({"params": p}, X).sum(), params
    model = jaxmp.apply_policy(Nnx(), policy, rules=rules)
    graph, params = nnx.split(model)
    return lambda p: nnx.merge(graph, p)(X).sum(), params


every_kind = pytest.mark.parametrize("kind", ["linen", "nnx"])


def by_layer(kind, policy, rules=()):
    loss, params = network(kind, policy, rules)
    found = dtypes_by_weight(jax.grad(loss), params)
    return {
        name: next(dtypes for path, dtypes in found.items() if name in path)
        for name in ("up", "down")
    }


@every_kind
def test_a_rule_decides_for_its_layer(kind):
    wide = jaxmp.PolicyRule(path="down", reduce="float32")
    expected = {"up": {"bfloat16"}, "down": {"float32"}}
    assert by_layer(kind, HALF, [wide]) == expected
    half = jaxmp.PolicyRule(path="up", reduce="bfloat16")
    assert by_layer(kind, WIDE, [half]) == expected


@every_kind
def test_a_rule_for_the_reduction_leaves_the_other_dtypes_to_later_rules(kind):
    rules = [
        jaxmp.PolicyRule(path="down", reduce="float32"),
        jaxmp.PolicyRule(path="down", compute="float32"),
    ]
    assert by_layer(kind, HALF, rules) == {"up": {"bfloat16"}, "down": {"float32"}}
    loss, params = network(kind, HALF, rules)
    operands = {m.operands for m in matmuls(jax.make_jaxpr(loss)(params))}
    assert (FLOAT32, FLOAT32) in operands


def run(kind, policy, rule):
    loss, params = network(kind, policy, [rule])
    loss(params)


@every_kind
def test_a_rule_that_matches_no_layer_is_an_error(kind):
    rule = jaxmp.PolicyRule(path="sideways", reduce="float32")
    with pytest.raises(UnusedRule, match="sideways"):
        run(kind, HALF, rule)


@every_kind
def test_a_rule_that_is_too_narrow_for_its_layer_is_an_error(kind):
    rule = jaxmp.PolicyRule(path="down", reduce="bfloat16")
    with pytest.raises(JaxmpError, match="narrower"):
        run(kind, "mixed_float16", rule)


def test_describe_shows_the_dtype_of_each_layer():
    rule = jaxmp.PolicyRule(path="up", reduce="bfloat16")
    rules = [rule, *jaxmp.default_rules]
    described = jaxmp.describe(Linen(), WIDE, X, rules=rules)
    rows = {row.path: row for row in described.rows}
    assert (rows["up"].reduces, rows["down"].reduces) == ("bfloat16", "float32")
    plain = str(jaxmp.describe(Linen(), HALF, X)).lower()
    assert "reduces" not in plain


# Lifted transformations of Flax


class Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(8)(nn.gelu(nn.remat(nn.Dense)(8)(x)))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.gelu(nn.Dense(8)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Step, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers()(x, None)[0]


@pytest.mark.parametrize("cls", [Rematerialised, Scanned])
def test_under_scan_and_remat_of_linen(cls):
    model = jaxmp.apply_policy(cls(), WIDE)
    params = model.init(jax.random.key(0), X)
    found = dtypes_by_weight(jax.grad(lambda p: model.apply(p, X).sum()), params)
    assert set(map(frozenset, found.values())) == {frozenset(["float32"])}


def test_under_scan_of_nnx():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = make(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def run(layer, x):
                return nnx.gelu(layer(x))

            return run(self.layers, x)

    model = jaxmp.apply_policy(Stack(), WIDE)
    graph, params = nnx.split(model)
    found = dtypes_by_weight(jax.grad(lambda p: nnx.merge(graph, p)(X).sum()), params)
    assert list(found.values()) == [{"float32"}]
