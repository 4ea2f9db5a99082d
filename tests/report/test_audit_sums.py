"""Sums that have more terms than their half accumulator can tell apart are found.

Planted sums are run as well, on ones, for the rule to be true of the numbers: what is
told loses terms where it is added one after the other, and what is not told loses none.
"""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmp
from jaxmp.report import audit
from jaxmp.report.audit._accumulations import largest_safe

DTYPES = {"bfloat16": 256, "float16": 2048}


def ones(*shape):
    return jnp.ones(shape, jnp.bfloat16)


# One after the other: each takes an array of (n, 2) and adds its rows.


def scanned(x):
    return lax.scan(lambda c, row: (c + row, None), jnp.zeros_like(x[0]), x)[0]


def scanned_the_other_way_round(x):
    return lax.scan(lambda c, row: (row + c, None), jnp.zeros_like(x[0]), x)[0]


def scanned_in_a_loop(x):
    return lax.fori_loop(0, len(x), lambda i, c: c + x[i], jnp.zeros_like(x[0]))


def scanned_with_a_mask(x):
    def body(c, row):
        return jnp.where(row > 0, c + row, c), None

    return lax.scan(body, jnp.zeros_like(x[0]), x)[0]


def scanned_and_rounded(x):
    """The addition is in float32, and what is carried is not."""

    def body(c, row):
        total = c.astype(jnp.float32) + row.astype(jnp.float32)
        return total.astype(x.dtype), None

    return lax.scan(body, jnp.zeros_like(x[0]), x)[0]


def scanned_in_a_tree(x):
    def body(state, row):
        return {"sum": jax.jit(jnp.add)(state["sum"], row), "n": state["n"] + 1}, row

    state = {"sum": jnp.zeros_like(x[0]), "n": 0}
    return lax.scan(jax.checkpoint(body), state, x)[0]["sum"]


def scanned_in_a_scan(x):
    pairs = x.reshape(-1, 2, x.shape[1]) if len(x) % 2 == 0 else x[:, None]

    def body(c, rows):
        return lax.scan(lambda c, row: (c + row, None), c, rows)[0], None

    return lax.scan(body, jnp.zeros_like(x[0]), pairs)[0]


def subtracted(x):
    return -lax.scan(lambda c, row: (c - row, None), jnp.zeros_like(x[0]), x)[0]


def scattered_in_a_scan(x):
    def body(c, row):
        return c.at[0].add(row), None

    return lax.scan(body, jnp.zeros((1, x.shape[1]), x.dtype), x)[0][0]


def segments(x):
    ids = jnp.zeros(len(x), int)
    return jax.ops.segment_sum(x, ids, 1)[0]


def lookups(x):
    """The gradient of a table whose one row is looked up again and again."""
    table, rows = jnp.zeros((1, x.shape[1]), x.dtype), jnp.zeros(len(x), int)
    return jax.grad(lambda table: jnp.vdot(table[rows].astype(jnp.float32), x))(table)[
        0
    ]


SEQUENTIAL = [
    scanned,
    scanned_the_other_way_round,
    scanned_in_a_loop,
    scanned_with_a_mask,
    scanned_and_rounded,
    scanned_in_a_tree,
    scanned_in_a_scan,
    subtracted,
    scattered_in_a_scan,
    segments,
    lookups,
]


def accumulated(fn, x):
    return audit(fn, jax.ShapeDtypeStruct(x.shape, x.dtype)).accumulations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fn", SEQUENTIAL, ids=lambda fn: fn.__name__)
def test_what_is_told_loses_terms_and_what_is_not_loses_none(fn, dtype):
    safe = DTYPES[dtype]
    assert largest_safe(dtype) == safe
    enough, more = jnp.ones((safe, 2), dtype), jnp.ones((safe + 2, 2), dtype)
    assert not accumulated(fn, enough)
    assert (jax.jit(fn)(enough) == safe).all()
    (found,) = accumulated(fn, more)
    assert (found.terms, found.dtype, found.largest_safe) == (safe + 2, dtype, safe)
    assert found.is_sequential
    assert (jax.jit(fn)(more) == safe).all()
    lines, start = inspect.getsourcelines(fn)
    assert start <= found.source.line < start + len(lines)


# In one operation, of as many bits as its compiler likes.


def reduced(x):
    return lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None)


def windows(x):
    return lax.reduce_window(
        x, jnp.zeros((), x.dtype), lax.add, x.shape, x.shape, "SAME"
    )


def broadcast(x):
    return jax.grad(lambda b: jnp.vdot((b + x).astype(jnp.float32), x))(x[:1])


AT_ONCE = [reduced, windows, broadcast, functools.partial(jnp.cumsum, axis=0)]


@pytest.mark.parametrize("fn", AT_ONCE)
def test_a_reduction_in_half_is_told_by_its_number_of_terms(fn):
    assert not accumulated(fn, ones(128, 2))
    (found,) = accumulated(fn, ones(300, 2))
    assert found.terms in (300, 600)
    assert not found.is_sequential
    findings = audit(fn, ones(300, 2)).findings
    (finding,) = (f for f in findings if f.kind == "accumulation")
    assert "unless the compiler keeps more bits" in finding.message


# Unrolled


def unrolled(x, n=300):
    total = x
    for _ in range(n):
        total = total + jnp.sin(x)
    return total


def used_often(w, n=300):
    return sum(jnp.vdot(w, w * float(i)).astype(jnp.float32) for i in range(n))


def test_additions_in_a_row_are_told_once_with_their_number():
    (found,) = accumulated(unrolled, ones(4))
    assert (found.operation, found.terms) == ("add", 301)
    assert found.source.function == "unrolled"
    assert not accumulated(functools.partial(unrolled, n=20), ones(4))
    gradient = accumulated(jax.grad(used_often), ones(4))
    assert any(x.is_backward and x.terms >= 300 for x in gradient)


# What is no such sum


def in_float32(x):
    def body(c, row):
        return c + row, None

    return lax.scan(body, jnp.zeros(x.shape[1:], jnp.float32), x)[0].astype(x.dtype)


def residual_stream(x):
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    return lax.scan(layer, x, jnp.ones((24, x.shape[1], x.shape[1]), x.dtype))[0]


def recurrence(x):
    def body(c, row):
        return jnp.tanh(c * row + row), None

    return lax.scan(body, jnp.zeros_like(x[0]), x)[0]


def counted(x):
    return lax.scan(lambda n, row: (n + 1, row), 0, x)[0]


def written_by_row(x):
    def body(c, i):
        return c.at[i].add(x[i]), None

    return lax.scan(body, jnp.zeros_like(x), jnp.arange(len(x)))[0]


def permuted(x):
    order = jnp.argsort(x[:, 0])
    return jax.grad(lambda x: x[order].astype(jnp.float32).sum())(x)


def picked(x):
    """The labels' logits in a loss: one in each row."""
    labels = jnp.argmax(x, axis=1)

    def loss(x):
        return x[jnp.arange(len(x)), labels].astype(jnp.float32).sum()

    return jax.grad(loss)(x)


def taken_along(x):
    labels = jnp.argmax(x, axis=1)[:, None]

    def loss(x):
        return jnp.take_along_axis(x, labels, axis=1).astype(jnp.float32).sum()

    return jax.grad(loss)(x)


def newton(x):
    """As many iterations as it needs, each computed from the one before."""
    return lax.while_loop(lambda y: (y > 1).any(), lambda y: y - y * x / 2, x)


HEALTHY = [
    *(in_float32, residual_stream, recurrence, counted, written_by_row, permuted),
    *(picked, taken_along, newton, jnp.sum, jnp.mean, jnp.var, jax.nn.softmax),
    *(jax.nn.logsumexp, functools.partial(jnp.matmul, ones(3000, 3000))),
    *(jax.grad(lambda x: jnp.mean(x * 2).astype(jnp.float32)),),
    lambda x: jax.ops.segment_sum(x, jnp.arange(3000) % 1000, 1000),
]


@pytest.mark.parametrize("fn", HEALTHY)
def test_what_is_no_long_sum_in_half_raises_no_alarm(fn):
    assert not accumulated(fn, ones(3000, 4))


def test_a_while_is_told_if_what_it_adds_is_its_own():
    def summed(x):
        def more(state):
            return state[0] < x[0, 0].astype(int) * 1000

        def add(state):
            i, total = state
            return i + 1, total + x[i]

        return lax.while_loop(more, add, (0, jnp.zeros_like(x[0])))[1]

    (found,) = accumulated(summed, ones(8, 4))
    assert (found.operation, found.terms) == ("while", None)
    assert "an unknown number of terms" in str(found)
    assert np.all(np.asarray(summed(ones(8, 4)), np.float32) == 256)


# What it says


def test_a_finding_says_how_many_terms_what_that_means_and_the_repair():
    x = jax.ShapeDtypeStruct((5000, 64), jnp.bfloat16)
    (finding,) = audit(scanned, x).findings
    assert finding.kind == "accumulation"
    assert finding.source.function == "scanned.<locals>.<lambda>"
    for words in (
        "accumulates in half: a loop that carries the sum of 5000 terms",
        "in bfloat16[64], which holds 256 equal ones",
        "from there on, sum + term rounds to the sum (once)",
    ):
        assert words in finding.message
    assert "start with jnp.zeros(shape, jnp.float32)" in finding.repair
    assert "1 accumulation" in audit(scanned, x).summary
    (row,) = (r for r in audit(scanned, x).to_rows() if r["table"] == "accumulation")
    assert (row["terms"], row["largest_safe"]) == (5000, 256)


def test_it_comes_before_what_is_only_slow():
    def fn(x, w):
        return scanned(x), w @ w

    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    found = audit(fn, ones(500, 4), w, policy="mixed_bfloat16")
    assert [f.kind for f in found.findings] == ["accumulation", "matmul"]


def test_the_repair_of_a_gradient_is_that_of_its_value():
    def loss(table, tokens):
        return table[tokens].astype(jnp.float32).sum()

    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    table = jax.ShapeDtypeStruct((5000, 8), jnp.bfloat16)
    (finding,) = audit(jax.grad(loss), table, tokens).findings
    assert "up to 2048 terms" in finding.message
    assert "in the backward pass" in finding.message
    assert "table[rows].astype(x.dtype)" in finding.repair
    wide = jax.ShapeDtypeStruct(table.shape, jnp.float32)
    assert not audit(jax.grad(jaxmp.autocast(loss)), wide, tokens).accumulations


class Words(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(4, name="head")(nn.Embed(5000, 8, name="words")(tokens))


def test_lookups_under_a_policy_add_their_gradients_in_float32():
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    params = jax.eval_shape(Words().init, jax.random.key(0), tokens)
    model = jaxmp.apply_policy(Words(), "mixed_bfloat16")

    def loss(params, tokens):
        return model.apply(params, tokens).astype(jnp.float32).sum()

    assert not audit(jax.grad(loss), params, tokens).accumulations


def test_a_cumulative_sum_and_its_gradient_are_one_finding():
    def loss(x):
        return jnp.sum(jnp.cumsum(x, axis=0) ** 2).astype(jnp.float32)

    found = audit(jax.grad(loss), ones(300, 2)).accumulations
    assert [(x.operation, x.is_backward) for x in found] == [("cumsum", False)]
