"""`search_policy`: finds what was planted, and nothing else, in few evaluations."""

import dataclasses
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp.casting import OpRule
from jaxmp.errors import NumericsError, SearchStateMismatch
from jaxmp.numerics import search_policy
from jaxmp.numerics.search._minimise import minimise

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


# Layers that half precision breaks, and what they compute in float32: about x.

FRAGILE = {
    "overflow": lambda x: (x * 3000.0) * (jnp.abs(x) * 3000.0) / 9e6,
    "underflow": lambda x: ((x * 1e-5) * 1e-5) * 1e10,
    "cancel": lambda x: (x + 5000.0) - 5000.0,
    "ratio": lambda x: ((1.0 + x * 1e-3) - 1.0) * 1e3,
    "difference": lambda x: x * 1000.0 - (x * 1000.0 - x),
}
PLANTED = {
    "float16": ("overflow", "underflow", "cancel"),
    "bfloat16": ("cancel", "ratio", "difference"),
}


def smooth(x):
    return jnp.where(x > 0, x, 0.7 * x)


def plain(dtype, depth):
    """A function with named scopes, three of which are fragile."""
    places = dict(
        zip((depth // 4, depth // 2, 3 * depth // 4), PLANTED[dtype], strict=True)
    )
    keys = jax.random.split(jax.random.key(0), depth)
    weights = [jax.random.normal(key, (8, 8)) * 8**-0.5 for key in keys]

    def loss(weights, x):
        for i, w in enumerate(weights):
            with jax.named_scope(f"layer_{i}"):
                x = smooth(x @ w)
            if i in places:
                with jax.named_scope(places[i]):
                    x = FRAGILE[places[i]](x)
        return jnp.mean(x**2)

    return loss, (weights, X)


class Fragile(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        return FRAGILE[self.kind](x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return smooth(nn.Dense(8, name="dense")(x))


class Net(nn.Module):
    planted: tuple[str, ...]
    depth: int = 12

    @nn.compact
    def __call__(self, x):
        places = dict(zip((2, 5, 9), self.planted, strict=True))
        for i in range(self.depth):
            x = Layer(name=f"layer_{i}")(x)
            if i in places:
                x = Fragile(places[i], name=places[i])(x)
        return nn.Dense(4, name="head")(x)


def linen(dtype):
    model = Net(PLANTED[dtype])
    variables = model.init(jax.random.key(0), X)
    return lambda v, x: jnp.mean(model.apply(v, x) ** 2), (variables, X)


def error_under(found, fn, args, dtype):
    """The gradient's relative error, as a user would see it."""
    half = jaxmp.autocast(fn, found.policy, rules=found.rules)
    scale = found.loss_scale
    exact = jax.grad(fn)(*args)
    given = jax.jit(jax.grad(lambda *args: half(*args) * scale))(*args)
    pairs = zip(jax.tree.leaves(exact), jax.tree.leaves(given), strict=True)
    return max(
        float(jnp.linalg.norm(y / scale - x) / jnp.linalg.norm(x)) for x, y in pairs
    )


@pytest.mark.parametrize("dtype", PLANTED)
def test_three_of_twelve_scopes_of_a_function_are_found(dtype):
    fn, args = plain(dtype, 12)
    found = search_policy(fn, dtype, args, tolerance=0.1)
    assert {kept.name for kept in found.kept} == set(PLANTED[dtype]), str(found)
    assert found.is_within
    assert found.is_minimal
    assert found.result.error <= 0.1
    assert found.result.half_flops == 1.0
    assert len(found.evaluations) <= 40
    assert error_under(found, fn, args, dtype) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PLANTED)
def test_three_of_twelve_linen_layers_are_found_in_forty_evaluations(dtype):
    fn, args = linen(dtype)
    found = search_policy(fn, dtype, args, tolerance=0.1)
    assert {kept.name for kept in found.kept} == set(PLANTED[dtype]), str(found)
    assert found.is_within
    assert found.is_minimal
    assert len(found.evaluations) <= 40


@pytest.fixture(scope="module")
def overflowing():
    """Two layers, one of which overflows, and what is found of it."""

    def loss(w, x):
        with jax.named_scope("first"):
            x = x @ w
        with jax.named_scope("fragile"):
            x = FRAGILE["overflow"](x)
        with jax.named_scope("last"):
            x = x @ w
        return jnp.mean(x**2)

    args = (jnp.eye(8), X)
    return loss, args, search_policy(loss, "mixed_float16", args)


def test_a_reason_names_the_line_and_what_happens(overflowing):
    _, _, found = overflowing
    (kept,) = found.kept
    assert kept.name == "fragile"
    assert kept.error == np.inf
    assert "mul at test_search.py:" in kept.reason
    assert "float16 ends at 65504" in kept.reason
    assert isinstance(kept.rule, jaxmp.PolicyRule)


def test_searches_are_deterministic(overflowing):
    fn, args, found = overflowing
    again = search_policy(fn, "mixed_float16", args)
    assert again == found


def test_the_worst_batch_counts():
    def loss(w, offset):
        with jax.named_scope("first"):
            x = X @ w
        with jax.named_scope("offset"):
            x = (x + offset) - offset
        with jax.named_scope("last"):
            return jnp.mean((x @ w) ** 2)

    harmless, harmful = ((jnp.eye(8), jnp.float32(x)) for x in (0.0, 5000.0))
    fine = search_policy(loss, "bfloat16", harmless)
    both = search_policy(loss, "bfloat16", harmless, harmful)
    assert fine.kept == ()
    assert [kept.name for kept in both.kept] == ["offset"]


def test_operations_outside_of_scopes_are_named_by_function():
    def square(x):
        return (x * 3000.0) * (x * 3000.0)

    def loss(w, x):
        return jnp.mean((square(x @ w) / 9e6) @ w)

    args = (jnp.eye(8), X)
    found = search_policy(loss, "mixed_float16", args)
    assert found.is_within
    (kept,) = (kept for kept in found.kept if kept.error == np.inf)
    assert kept.name == "mul in function square"
    assert isinstance(kept.rule, OpRule)


def test_from_everything_in_half():
    everything = OpRule(function=".*", compute="float16", allow_unused=True)

    def loss(w, x):
        with jax.named_scope("first"):
            x = x @ w
        with jax.named_scope("norm"):
            x = x * jax.lax.rsqrt(jnp.mean((x * 300.0) ** 2, -1, keepdims=True)) * 300.0
        with jax.named_scope("last"):
            return jnp.mean(x @ w)

    found = search_policy(loss, "mixed_float16", (jnp.eye(8), X), rules=[everything])
    assert [kept.name for kept in found.kept] == ["norm"]
    assert found.rules == (found.kept[0].rule, everything)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.down = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x * 1e5) * 1e-5)


def test_rules_for_layers_fit_apply_policy_too():
    model = NnxNet(nnx.Rngs(0))
    found = search_policy(lambda m, x: jnp.mean(m(x) ** 2), "float16", (model, X))
    assert found.is_within
    rules = [rule for rule in found.rules if isinstance(rule, jaxmp.PolicyRule)]
    assert [rule.path for rule in rules] == ["up"]
    applied = jaxmp.apply_policy(model, "mixed_float16", rules=rules)
    assert applied.up.dtype == jnp.float32


def test_nothing_has_to_stay():
    found = search_policy(lambda w, x: jnp.mean((x @ w) ** 2), "bfloat16", (X.T, X))
    assert found.kept == ()
    assert found.rules == ()
    assert len(found.evaluations) == 1


def test_a_loss_that_is_not_finite_in_float32_is_refused():
    def loss(w, x):
        return jnp.mean(jnp.log(x @ w))

    with pytest.raises(NumericsError, match=r"batch 1 is not finite.*find_nonfinite"):
        search_policy(loss, "bfloat16", (jnp.eye(8), abs(X)), (jnp.eye(8), 0 * X))


# The budget, and searches that are stopped


def test_a_spent_budget_gives_the_best_so_far(overflowing):
    fn, args, found = overflowing
    one = search_policy(fn, "mixed_float16", args, budget=1)
    assert not one.is_within
    assert not one.is_minimal
    two = search_policy(fn, "mixed_float16", args, budget=2)
    assert two.is_within
    assert not two.is_minimal
    assert len(two.kept) > len(found.kept)
    assert "The budget ended" in two.summary


def test_a_search_goes_on_where_it_stopped(overflowing, tmp_path, monkeypatch):
    fn, args, found = overflowing
    file = tmp_path / "search.json"
    search_policy(fn, "mixed_float16", args, budget=2, resume=file)
    assert len(json.loads(file.read_text())["evaluations"]) == 2
    full = search_policy(fn, "mixed_float16", args, resume=file)
    assert full == found
    # Everything is in the file now: nothing is evaluated.
    monkeypatch.setattr(
        "jaxmp.numerics.search._problem.Problem._measure",
        lambda *_: pytest.fail("evaluated"),
    )
    assert search_policy(fn, "mixed_float16", args, resume=file) == found


def test_a_file_of_another_search_is_refused(overflowing, tmp_path):
    fn, (w, x), _ = overflowing
    file = tmp_path / "search.json"
    options = {"budget": 1, "resume": file, "loss_scale": 1.0}
    search_policy(fn, "mixed_float16", (w, x), **options)
    with pytest.raises(SearchStateMismatch, match=r"batches differ.*another file"):
        search_policy(fn, "mixed_float16", (w, 2 * x), **options)
    file.write_text("{}")
    with pytest.raises(SearchStateMismatch, match=r"not hold a search.*another file"):
        search_policy(fn, "mixed_float16", (w, x), resume=file)


def test_progress(overflowing, capfd):
    fn, args, _ = overflowing
    search_policy(fn, "mixed_float16", args, budget=1)
    assert capfd.readouterr().err == ""
    search_policy(fn, "mixed_float16", args, budget=1, progress=True)
    assert "search_policy" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: search_policy(jnp.sum, "float32", (X,)),
            ("float32", "'mixed_float16'"),
        ),
        (lambda: search_policy(jnp.sum, "float16"), ("none", "(params, x, labels)")),
        (lambda: search_policy(jnp.sum, "float16", X), ("ndarray", "tuple")),
        (lambda: search_policy(jnp.sum, "float16", (X,), budget=0), ("budget=0",)),
    ],
)
def test_mistakes_are_explained(call, words):
    with pytest.raises(NumericsError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


# The search by itself


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_the_smallest_set_is_found_whatever_the_ranks(size):
    ranked = tuple(range(12))
    rng = np.random.default_rng(size)
    for _ in range(20):
        needed = set(rng.choice(12, size, replace=False).tolist())
        tried = set()

        def is_good(kept, needed=needed, tried=tried):
            tried.add(kept)
            return needed <= set(kept)

        *_, last = minimise(ranked, is_good)
        assert set(last) == needed
        assert len(tried) <= 40


def test_no_member_can_be_left_out_where_either_of_two_will_do():
    ranked = tuple(range(8))

    def is_good(kept):
        return (1 in kept or 6 in kept) and (3 in kept or 4 in kept)

    *_, last = minimise(ranked, is_good)
    assert is_good(last)
    assert not any(
        is_good(rest) for rest in itertools.combinations(last, len(last) - 1)
    )


# Forms


def test_the_curve_is_sorted_by_what_runs_in_half(overflowing):
    _, _, found = overflowing
    rows = found.to_rows()
    shares = [row["half_flops"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    assert {row["is_within"] for row in rows} == {True, False}


def test_text_page_json_and_chart(overflowing, tmp_path):
    _, _, found = overflowing
    assert "fragile" in str(found)
    assert str(found).startswith("1 layer or operation stays in float32")
    told = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert told["kept"][0]["error"] is None
    found.to_html(tmp_path / "page.html")
    assert "ends at 65504" in (tmp_path / "page.html").read_text()
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_frozen(overflowing):
    with pytest.raises(dataclasses.FrozenInstanceError):
        overflowing[2].tolerance = 1.0


def test_batched_matmuls_in_any_layout_can_be_tried_in_half():
    # CPUs do not multiply half to float32 with batch axes that are not the first.
    def loss(w, x):
        q = (x @ w).reshape(2, 16, 2, 4)
        return jnp.mean(jnp.einsum("bqhd,bkhd->bhqk", q, q) ** 2)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.float32)
    found = search_policy(loss, "mixed_bfloat16", (jnp.eye(8), x))
    assert found.kept == ()
