"""Sums that are written term by term are float32; layers written so are in half."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.casting.sums._unrolled import TERMS, unrolled_sums

STEPS, SIZE = 24, 8
KEYS = jax.random.split(jax.random.key(0), 4)
W = jax.random.normal(KEYS[0], (SIZE, SIZE)) / SIZE**0.5
Q, K, V = (jax.random.normal(key, (STEPS, SIZE)) for key in KEYS[1:])


def linear_attention(w):
    q, k = jax.nn.softplus(Q @ w), jax.nn.softplus(K @ w)
    state, total, out = jnp.zeros((SIZE, SIZE)), jnp.zeros(SIZE), []
    for t in range(STEPS):
        state, total = state + jnp.outer(k[t], V[t]), total + k[t]
        out.append((q[t] @ state) / (q[t] @ total))
    return jnp.stack(out)


def leaky(w):
    x, h, out = V @ w + 1, jnp.ones(SIZE), []
    for t in range(STEPS):
        h = 0.999 * h + 0.001 * x[t]
        out.append(h @ w)
    return jnp.stack(out)


def retention(w):
    q, k, s, out = Q @ w, K @ w, jnp.zeros((SIZE, SIZE)), []
    for t in range(STEPS):
        s = 0.97 * s + jnp.outer(k[t], V[t])
        out.append(q[t] @ s)
    return jnp.stack(out)


def gated(w):
    gate, x, h, out = jax.nn.sigmoid(K @ w + 4), V @ w, jnp.zeros(SIZE), []
    for t in range(STEPS):
        h = gate[t] * h + (1 - gate[t]) * x[t]
        out.append(h @ w)
    return jnp.stack(out)


def products(w):
    """Terms that are matmuls themselves."""
    x = Q @ w
    for t in range(2 * TERMS):
        x = x + (K * V[t, 0]) @ w
    return x @ w


SUMS = [linear_attention, leaky, retention, gated, products]


@pytest.mark.parametrize("fn", SUMS, ids=lambda f: f.__name__)
def test_a_sum_is_float32_and_the_matmuls_around_it_are_in_half(fn):
    told = jaxmp.explain(fn)(W)
    assert told.half_flops == 1.0
    added = [row for row in told.rows if row.operation == "add"]
    in_half = [row for row in added if "bf16" in row.after]
    assert len(added) >= STEPS
    assert len(in_half) <= (1 if fn is leaky else 0)


def test_a_sum_is_as_accurate_as_its_terms():
    expected, actual = (jax.jit(fn)(W) for fn in (products, jaxmp.autocast(products)))
    assert np.linalg.norm(actual - expected) < 0.008 * np.linalg.norm(expected)


def network(w, block, count):
    x = V @ w
    for _ in range(count):
        x = block(x, w)
    return x @ w


def mlp(x, w):
    return jax.nn.gelu(x @ w) @ w


LAYERS = {
    "pre-norm": lambda x, w: x + mlp(jax.nn.standardize(x), w),
    "post-norm": lambda x, w: jax.nn.standardize(x + mlp(x, w)),
    "scaled": lambda x, w: (x + mlp(x, w)) / jnp.sqrt(2.0),
    "two terms": lambda x, w: x + mlp(x, w) + jnp.tanh(x @ w) @ w,
}


@pytest.mark.parametrize("name", LAYERS)
def test_many_layers_are_no_sum(name):
    fn = functools.partial(network, block=LAYERS[name], count=2 * TERMS)
    jaxpr = jax.make_jaxpr(fn)(W)
    assert not unrolled_sums(jaxpr.jaxpr)


def test_an_equation_without_a_result_is_no_term():
    def fn(w):
        y = products(w)
        jax.jit(lambda y: None)(y)
        jax.debug.callback(lambda y: None, y)
        return y

    assert unrolled_sums(jax.make_jaxpr(fn)(W).jaxpr)


def test_a_few_terms_are_no_sum():
    def fn(w):
        x = Q @ w
        for t in range(TERMS // 2):
            x = x + V * t
        return x @ w

    assert not unrolled_sums(jax.make_jaxpr(fn)(W).jaxpr)


def test_what_reads_a_long_sum_is_in_half_again():
    def fn(w):
        x, y = products(w), Q @ w
        return ((y + x) * 2 + y) @ w

    told = jaxmp.explain(fn)(W)
    reasons = [r.reason for r in told.rows if "sum of many terms" in r.reason]
    assert len(reasons) == 2 * TERMS
