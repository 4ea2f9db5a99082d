"""Rules that say how matmuls are multiplied, and what is said where nothing is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.casting import OpRule
from jaxmp.errors import AutocastRuleError, NoBlocksWarning, NothingQuantizedWarning
from jaxmp.policy import first_and_last_in_half

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 64))
W = jax.random.normal(KEY, (4, 64, 64)) / 8


def blocks(w, x):
    for i in range(4):
        with jax.named_scope(f"block_{i}"):
            x = x + jnp.tanh(x @ w[i])
    with jax.named_scope("head"):
        return jnp.square(x @ w[0]).mean()


def recipes(fn, *args, policy="mixed_fp8", rules=()):
    found = jaxmp.explain(fn, policy, rules=rules)(*args).quantized
    return {matmul.path: matmul.recipe for matmul in found}


def test_a_rule_takes_the_head_and_any_sizes():
    found = recipes(blocks, W, X[:30], rules=[OpRule(path="head", quantize="fp8")])
    assert found == {**{f"block_{i}": "" for i in range(4)}, "head": "fp8"}


def test_a_rule_gives_another_recipe_under_any_half_policy():
    rules = [OpRule(path="block_1", quantize="int8")]
    found = recipes(blocks, W, X, policy="mixed_float16", rules=rules)
    assert [name for name, recipe in found.items() if recipe] == ["block_1"]
    assert recipes(blocks, W, X, rules=rules)["block_1"] == "int8"


@pytest.mark.parametrize(
    "rule",
    [
        OpRule(path="block_[01]", quantize="none"),
        OpRule(path="block_[01]", compute="bfloat16"),
        jaxmp.PolicyRule(path="block_[01]", quantize="none"),
        jaxmp.PolicyRule(path="block_[01]", compute="bfloat16"),
    ],
)
def test_none_and_a_compute_dtype_leave_matmuls_in_half(rule):
    found = recipes(blocks, W, X, rules=[rule])
    assert [found[f"block_{i}"] for i in range(4)] == ["", "", "fp8", "fp8"]


def test_the_first_rule_that_decides_wins():
    rules = [
        OpRule(path="block_0", quantize="fp8:rowwise"),
        OpRule(path="block_.*", quantize="none"),
    ]
    found = recipes(blocks, W, X, rules=rules)
    assert list(found.values()) == ["fp8:rowwise", "", "", "", ""]


def test_products_of_activations_stay_in_half_whatever_a_rule_says():
    def fn(w, x):
        return jax.nn.softmax((x @ w[0]) @ (x @ w[1]).T) @ w[2, :32]

    rules = [OpRule(primitive="dot_general", quantize="fp8")]
    found = jaxmp.explain(fn, "mixed_fp8", rules=rules)(W, X).quantized
    assert [matmul.recipe for matmul in found] == ["fp8", "fp8", "", "fp8"]


@pytest.mark.parametrize("policy", ["mixed_fp8", "mixed_int8"])
def test_without_a_matmul_in_it_a_policy_is_that_of_its_compute_dtype(policy):
    rules = [OpRule(primitive="dot_general", quantize="none")]

    def run(policy, rules):
        fn = jaxmp.autocast(blocks, policy, rules=rules)
        return jax.jit(jax.value_and_grad(fn))(W, X)

    with pytest.warns(NothingQuantizedWarning):
        found = run(policy, rules)
    jax.tree.map(np.testing.assert_array_equal, found, run("mixed_bfloat16", ()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": "a", "quantize": "fp9"}, ["'fp9'", "fp8:rowwise", "none"]),
        ({"path": "a"}, ["has to set one dtype"]),
        ({"path": "a", "quantize": "fp8", "carry": "float32"}, ["one dtype"]),
        ({"quantize": "fp8"}, ["no condition"]),
    ],
)
def test_rules_that_cannot_be_read(arguments, words):
    with pytest.raises(AutocastRuleError, match=".*".join(map(re.escape, words))):
        OpRule(**arguments)


def test_the_outer_blocks_stay_in_half():
    rules = first_and_last_in_half(blocks=1)
    found = recipes(blocks, W, X, rules=rules)
    assert list(found.values()) == ["", "fp8", "fp8", "", ""]
    found = jaxmp.explain(jax.grad(blocks), "mixed_fp8", rules=rules)(W, X).quantized
    assert {m.path for m in found if m.recipe} == {"block_1", "block_2"}
    assert len([m for m in found if m.recipe]) == 6


def test_no_blocks_are_said():
    def fn(w, x):
        return jnp.tanh(x @ w[0]) @ w[1]

    with pytest.warns(
        NoBlocksWarning, match="no name scopes.*quantize='none'"
    ) as found:
        jaxmp.autocast(fn, "mixed_fp8", rules=first_and_last_in_half())(W, X)
    assert found[0].filename == __file__


def test_a_policy_that_quantises_nothing_says_so():
    fn = jaxmp.autocast(lambda w, x: x @ w[0], "mixed_fp8")
    with pytest.warns(NothingQuantizedWarning, match="the head.*OpRule") as found:
        fn(W, X)
    assert found[0].filename == __file__


def test_explain_shows_formats_recipes_and_shares():
    plan = jaxmp.explain(blocks, "mixed_fp8")(W, X)
    assert plan.quantized_flops == pytest.approx(0.8)
    assert "100% of the matmul FLOPs in half, 80% in a smaller format" in plan.summary
    assert plan.formats == (
        "80.0% of the FLOPs, 4 matmuls, in fp8: float8_e4m3fn, a scale per array",
        "20.0% of the FLOPs, 1 matmul, left in half: the head (no other matmul reads "
        "its result)",
    )
    rows = plan.only("quantized matmuls").rows
    assert {row.after for row in rows} == {"e4m3 e4m3 -> bf16"}
    assert all(line in str(plan) for line in plan.formats)
    assert jaxmp.explain(blocks, "mixed_bfloat16")(W, X).formats == ()


def test_float8_operands_of_the_program_are_shown():
    def fn(x):
        return (x.astype(jnp.float8_e4m3fn).astype(jnp.float32) @ W[0]).sum()

    rows = jaxmp.explain(fn)(X).rows
    assert [row.before for row in rows[:2]] == ["f32 -> e4m3", "e4m3 -> f32"]
