"""The tools for values, on programs whose matmuls are multiplied in float8 or int8."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp
from jaxmp.casting import OpRule
from jaxmp.errors import NothingQuantizedWarning
from jaxmp.numerics import compare, find_nonfinite, search_policy, trace
from jaxmp.numerics.ranges._formats import usual_rounding
from jaxmp.quantization.scales import quantize

WIDTH, HIDDEN, CLASSES, ROWS = 64, 256, 16, 32
POLICIES = ["mixed_fp8", "mixed_fp8:hybrid", "mixed_fp8:rowwise", "mixed_int8"]
every_policy = pytest.mark.parametrize("policy", POLICIES)
two_policies = pytest.mark.parametrize("policy", ["mixed_fp8:hybrid", "mixed_int8"])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[0])


PARAMS = {
    "up": normal(0, WIDTH, HIDDEN),
    "down": normal(1, HIDDEN, WIDTH),
    "head": normal(2, WIDTH, CLASSES),
}
X = jax.random.normal(jax.random.key(3), (ROWS, WIDTH))
LABELS = jax.random.randint(jax.random.key(4), (ROWS,), 0, CLASSES)


def network(params, x, labels):
    with jax.named_scope("up"):
        hidden = jax.nn.gelu(x @ params["up"])
    with jax.named_scope("down"):
        hidden = hidden @ params["down"]
    with jax.named_scope("head"):
        logits = hidden @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def are_fine(compared):
    """Whether nothing is inaccurate; a logit near the largest may well become it."""
    rows = (*compared.gradients, *compared.matmuls)
    activations = {row.kind for row in compared.activations if row.operation != "sub"}
    return {row.kind for row in rows} | activations <= {"fine"}


def with_an_outlier(size):
    """An input with one large feature, which no weight reads."""
    params = {**PARAMS, "up": PARAMS["up"].at[0].set(0.0)}
    return params, X.at[:, 0].set(size), LABELS


BROKEN = with_an_outlier(1e7)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(y, y)
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(y)


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(128, WIDTH, embedding_init=nn.initializers.normal(1.0))(tokens)
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(128, name="head")(nn.LayerNorm()(x))


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.down(nnx.gelu(self.up(x))))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_the_usual_rounding_of_a_format_is_that_of_normal_numbers(dtype):
    errors = []
    for step in range(8):
        x = 2 ** (step / 8) * jax.random.normal(jax.random.key(step), (64, 1024))
        rounded = quantize(x, jnp.dtype(dtype), (1,)).in_dtype(jnp.float32)
        errors.append(float(jnp.linalg.norm(rounded - x) / jnp.linalg.norm(x)))
    np.testing.assert_allclose(np.mean(errors), usual_rounding(dtype), rtol=0.06)


# trace


@two_policies
def test_trace_shows_what_each_operand_is_rounded_to(policy):
    traced = trace(network, policy)(PARAMS, X, LABELS)
    rows = [row for row in traced.rows if row.operation == "quantize"]
    cotangents = {row.dtype for row in rows if row.is_backward}
    operands = {row.dtype for row in rows if not row.is_backward}
    assert operands == {"int8" if "int8" in policy else "float8_e4m3fn"}
    assert ("float8_e5m2" in cotangents) == (policy == "mixed_fp8:hybrid")
    for row in rows:
        assert row.rounding == pytest.approx(usual_rounding(row.dtype), rel=0.4)
        assert row.kind == "fine"
        assert row.path in ("up", "down")
        assert row.function == "network"
    # The arithmetic of the scales is part of it, and not shown.
    assert not {"bitcast_convert_type", "shift_left"} & {
        r.operation for r in traced.rows
    }
    first = next(r for r in rows if r.path == "up" and r.size == X.size)
    assert first.amax == float(jnp.max(jnp.abs(X.astype(jnp.bfloat16))))
    assert f"rounded to {first.dtype}" in traced.summary
    assert {r.function for r in traced.rows if r.operation == "scaled_dot"} == {
        "network"
    }
    assert json.loads(traced.to_json())


def test_trace_counts_what_becomes_zero_under_a_scale():
    # 2^15 becomes 256. A step of e4m3 near zero is 2^-9, so that 2^-4 is 2^-11 there.
    x = jnp.concatenate([jnp.full((16, 16), 2.0**15), jnp.full((16, 48), 2.0**-4)], 1)

    def loss(params, x):
        return jnp.sum(jnp.sin(x @ params["up"]) @ params["down"])

    traced = trace(loss, "mixed_fp8")(PARAMS, x)
    row = next(r for r in traced.rows if r.operation == "quantize" and r.size == x.size)
    assert row.underflows == 0.75
    assert row.subnormals == 0
    assert row.kind == "underflow"
    assert (row.amax, row.smallest) == (2.0**15, 2.0**-4)
    assert traced.rows[0] is row


# compare


@every_policy
def test_a_fine_run_is_called_fine(policy):
    compared = compare(network, ["mixed_bfloat16", policy], PARAMS, X, LABELS)
    assert are_fine(compared)
    assert "inaccurate" not in compared.kinds
    assert {row.policy for row in compared.matmuls} == {policy}
    # Two forward, one gradient of an activation and two of weights.
    assert len(compared.matmuls) == 5
    for row in compared.matmuls:
        assert row.function == "network"
        assert 0.5 * row.usual < row.relative_error < 1.2 * row.usual
    half, smaller = compared.policies
    assert 2 * half.gradient_error < smaller.gradient_error < 0.1
    # A quantised matmul is compared with the matmul in its place.
    rows = [r for r in compared.activations if r.operation == "dot_general"]
    assert {(r.policy, r.path) for r in rows} == {
        (name, path)
        for name in ("mixed_bfloat16", policy)
        for path in ("up", "down", "head")
    }
    assert "What matmuls in a smaller format add by themselves" in str(compared)
    assert json.loads(compared.to_json())


@every_policy
def test_outliers_are_found_where_they_break_a_matmul(policy):
    compared = compare(network, policy, *BROKEN)
    worst = compared.matmuls[0]
    assert (worst.path, worst.is_backward, worst.kind) == ("up", False, "inaccurate")
    assert worst.relative_error > 0.9
    fine = [r for r in compared.matmuls if r.path == "down" and not r.is_backward]
    assert {row.kind for row in fine} == {"fine"}
    assert "inaccurate" in {row.kind for row in compared.gradients}
    assert are_fine(compare(network, "mixed_bfloat16", *BROKEN))


@pytest.mark.parametrize(
    "policy",
    ["mixed_int8", pytest.param("mixed_fp8:hybrid", marks=pytest.mark.slow)],
)
def test_a_deep_fine_network_is_called_fine(policy):
    model = LanguageModel()
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 128)
    params = model.init(jax.random.key(1), tokens)

    def loss(params, tokens):
        logits = model.apply(params, tokens)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    compared = compare(loss, policy, params, tokens)
    assert {row.kind for row in compared.matmuls} == {"fine"}
    assert "inaccurate" not in {row.kind for row in compared.activations}
    # The gradient of the keys' bias is zero but for rounding.
    wrong = [row.parameter for row in compared.gradients if row.kind == "inaccurate"]
    assert all("['key']['bias']" in name for name in wrong)


def test_matmuls_in_a_scan_are_measured_over_all_iterations():
    weights = jnp.stack([normal(i, WIDTH, WIDTH) for i in range(3)])

    def loss(weights, head, x):
        def layer(x, w):
            with jax.named_scope("layer"):
                return jnp.tanh(x @ w), None

        return jnp.sum((jax.lax.scan(layer, x, weights)[0] @ head) ** 2)

    compared = compare(loss, "mixed_fp8", weights, PARAMS["head"], X)
    sizes = {row.is_backward: row.size for row in compared.matmuls}
    assert sizes[False] == 3 * ROWS * WIDTH
    assert {row.kind for row in compared.matmuls} == {"fine"}


# search_policy


@two_policies
def test_the_matmuls_that_must_stay_in_half_are_found(policy):
    found = search_policy(network, policy, BROKEN)
    assert [(kept.name, kept.stays_in) for kept in found.kept] == [
        ("up in half", "half")
    ]
    assert found.is_within
    assert found.is_minimal
    assert "scaled_dot at" in found.kept[0].reason
    assert 0 < found.result.quantized_flops < 1
    assert found.result.half_flops == 1
    assert "the matmuls of 1 layer stay in half" in found.summary
    assert json.loads(found.to_json())["kept"][0]["stays_in"] == "half"
    healed = compare(network, policy, *BROKEN, rules=found.rules)
    assert are_fine(healed)
    assert {row.path for row in healed.matmuls} == {"down"}


@two_policies
def test_a_fine_network_keeps_nothing(policy):
    found = search_policy(network, policy, (PARAMS, X, LABELS))
    assert found.kept == found.rules == ()
    assert len(found.evaluations) == 1
    assert found.is_minimal


@pytest.mark.parametrize("policy", ["mixed_fp8"])
def test_layers_that_need_float32_are_found_beside(policy):
    def loss(params, x, labels):
        with jax.named_scope("fragile"):
            x = (x @ params["square"]) * 3000.0 * 3000.0 / 9e6
        return network(params, x, labels)

    params, x, labels = BROKEN
    square = jnp.eye(WIDTH)
    batch = {**params, "square": square}, jnp.where(x > 1e4, 0.0, x), labels
    recipe = policy.removeprefix("mixed_")
    half = f"params=float32,compute=float16,output=float32,quantize={recipe}"
    rules = [OpRule(primitive="mul", compute="float16")]
    found = search_policy(loss, half, batch, rules=rules, tolerance=0.1)
    assert [(kept.name, kept.stays_in) for kept in found.kept] == [
        ("fragile", "float32")
    ]
    assert found.is_within


def test_the_rules_of_a_search_are_for_apply_policy_too():
    model = Mlp(nnx.Rngs(0))
    kernel = model.up.kernel
    kernel[...] = kernel[...].at[0].set(0.0)
    x = X.at[:, 0].set(1e7)

    def loss(model, x, labels):
        logits = model(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    found = search_policy(loss, "mixed_fp8", (model, x, LABELS))
    assert [kept.name for kept in found.kept] == ["up in half"]
    healed = jaxmp.apply_policy(model, "mixed_fp8", rules=found.rules)
    exact = loss(model, x, LABELS)
    broken = jaxmp.apply_policy(model, "mixed_fp8")
    assert abs(loss(healed, x, LABELS) - exact) < 0.02 * exact
    assert abs(loss(broken, x, LABELS) - exact) > 0.02 * exact


def test_an_operation_outside_all_scopes_is_kept_by_its_function():
    def plain(params, x):
        return jnp.mean((jnp.sin(x @ params["up"]) @ params["head2"]) ** 2)

    params, x, _ = BROKEN
    batch = {"up": params["up"], "head2": normal(5, HIDDEN, CLASSES)}, x
    found = search_policy(plain, "mixed_fp8", batch)
    (kept,) = found.kept
    assert kept.rule.quantize == "none"
    assert kept.rule.function == "plain"
    assert found.is_within


def test_a_search_goes_on_from_its_file(tmp_path):
    path = tmp_path / "search.json"
    first = search_policy(network, "mixed_fp8", BROKEN, resume=path)
    again = search_policy(network, "mixed_fp8", BROKEN, resume=path)
    assert again.kept == first.kept
    assert again.evaluations == first.evaluations


# find_nonfinite


def test_an_infinity_is_blamed_on_where_it_comes_from():
    params = {**PARAMS, "up": PARAMS["up"].at[0, 0].set(jnp.inf)}
    for policy in ("mixed_fp8", "mixed_int8"):
        found = find_nonfinite(network, params, X, LABELS, policy=policy)
        assert "already holds Inf" in found.cause


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_quantised_matmul_that_overflows_is_explained(recipe):
    policy = f"params=float32,compute=float16,output=float32,quantize={recipe}"
    params = {**PARAMS, "up": PARAMS["up"] * 1e4}
    found = find_nonfinite(network, params, X * 1e3, LABELS, policy=policy)
    assert found.primitive == "scaled_dot"
    assert found.line is not None
    assert found.path == "up"
    assert f"a sum of {WIDTH} products" in found.cause
    assert "overflows float16" in found.cause
    # The operands are shown as they are under their scales.
    lhs, _ = found.operands
    assert lhs.high == pytest.approx(float(jnp.max(X)) * 1e3, rel=0.07)
    assert lhs.dtype in ("float8_e4m3fn", "int8")


def test_a_policy_that_quantises_nothing_is_named_with_its_function():
    def tiny(w, x):
        return jnp.sum(x @ w)

    with pytest.warns(NothingQuantizedWarning, match="every matmul of tiny in half"):
        compare(tiny, "mixed_fp8", jnp.ones((8, 8)), jnp.ones((4, 8)))
