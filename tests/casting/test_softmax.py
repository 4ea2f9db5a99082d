"""Softmaxes between matmuls: masks, biases and large scores, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from tests.support.thinning import every_second

HALF = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
TOLERANCE = {"mixed_bfloat16": 0.03, "mixed_float16": 0.004}
LENGTH = 6
CAUSAL = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
ROW = CAUSAL.at[2].set(False)  # a row in which nothing is attended to
BIAS = jnp.linspace(-3.0, 3.0, LENGTH * LENGTH).reshape(LENGTH, LENGTH)

SCORES = {
    "plain": lambda s: s,
    "scaled": lambda s: s / jnp.sqrt(8.0),
    "causal": lambda s: jnp.where(CAUSAL, s, jnp.finfo(s.dtype).min),
    "empty row": lambda s: jnp.where(ROW, s, jnp.finfo(s.dtype).min),
    "added mask": lambda s: s + jnp.where(ROW, 0.0, -1e9),
    "bias": lambda s: s * 0.3 + BIAS,
    "clipped": lambda s: jnp.clip(s, -4.0, 4.0),
    "capped": lambda s: 5.0 * jnp.tanh(s / 5.0),
    "temperature": lambda s: s / jnp.exp(0.3),
    "large": lambda s: s * 40.0,
    "beyond float16": lambda s: s * 1e5,
    "logarithms": lambda s: jnp.log1p(jnp.square(s)),
}
FORMS = {
    "softmax": lambda s: jax.nn.softmax(s, axis=-1),
    "where": lambda s: jax.nn.softmax(s, axis=-1, where=CAUSAL),
    "first axis": lambda s: jax.nn.softmax(s.T, axis=0).T,
    "by hand": lambda s: (
        (e := jnp.exp(s - s.max(-1, keepdims=True))) / e.sum(-1, keepdims=True)
    ),
    "no shift": lambda s: (
        (e := jnp.exp(jnp.minimum(s, 60.0))) / (1 + e.sum(-1, keepdims=True))
    ),
}


def attention(change, form):
    def fn(q, k, v):
        return form(change(q @ k.T)) @ v

    return fn


def arguments(dtype):
    """Queries, keys and values that half precision holds, and whose scores it holds."""
    keys = jax.random.split(jax.random.key(0), 3)
    whole = (jax.random.randint(key, (LENGTH, 8), -2, 3) for key in keys)
    return tuple(x.astype(jnp.float32) / 2 for x in whole)


@every_second("change form policy", SCORES, FORMS, HALF)
def test_values_and_gradients_are_close_to_float32(change, form, policy):
    fn = attention(SCORES[change], FORMS[form])
    args = arguments(HALF[policy])

    def loss(fn):
        return lambda *args: jnp.sum(jnp.square(fn(*args)))

    # Scores of 400 have a unit in the last place of 2 in bfloat16: only exact ones, as
    # these products are, leave a softmax that can be compared.
    tolerance = TOLERANCE[policy] * (4 if change in ("bias", "capped", "scaled") else 1)
    expected = fn(*args)
    cast = jaxmp.autocast(fn, policy)
    assert jnp.all(jnp.isfinite(expected))
    np.testing.assert_allclose(jax.jit(cast)(*args), expected, atol=tolerance)
    actual = jax.grad(loss(cast), (0, 1, 2))(*args)
    for a, e in zip(actual, jax.grad(loss(fn), (0, 1, 2))(*args), strict=True):
        scale = float(jnp.abs(e).max()) + 1e-3
        np.testing.assert_allclose(a / scale, e / scale, atol=4 * tolerance)


@pytest.mark.parametrize("policy", HALF)
def test_scores_from_outside_are_not_rounded(policy):
    scores = jnp.array([[100.0, 100.125, 99.9], [7.0, 7.01, 7.02]])
    v = jnp.eye(3)
    actual = jaxmp.autocast(lambda s, v: jax.nn.softmax(2 * s) @ v, policy)(scores, v)
    np.testing.assert_allclose(actual, jax.nn.softmax(2 * scores), rtol=0.005)


@pytest.mark.parametrize("policy", HALF)
def test_second_derivatives(policy):
    q, k, v = arguments(HALF[policy])
    fn = attention(SCORES["causal"], FORMS["softmax"])

    def curvature(fn):
        return jax.jvp(jax.grad(lambda q: jnp.sum(fn(q, k, v) ** 2)), (q,), (k,))[1]

    expected = curvature(fn)
    scale = float(jnp.abs(expected).max())
    actual = curvature(jaxmp.autocast(fn, policy))
    np.testing.assert_allclose(actual / scale, expected / scale, atol=0.05)


@pytest.mark.parametrize(
    ("change", "platform", "is_held"),
    [
        ("causal", "tpu", False),
        ("causal", "cuda", True),
        ("capped", "tpu", True),
        ("moved", "tpu", True),
        ("summed", "tpu", True),
    ],
)
def test_tpus_may_compute_a_softmax_again_from_rounded_scores(
    change, platform, is_held
):
    moved = {
        "moved": lambda s: jnp.roll(s, 1, axis=-1),
        # A sum of two half arrays, which would both be kept.
        "summed": lambda s: s + s @ jnp.eye(s.shape[-1]),
    }
    fn = jaxmp.autocast(attention({**SCORES, **moved}[change], FORMS["softmax"]))
    grad = jax.jit(jax.grad(lambda *args: fn(*args).sum(), (0, 1, 2)))
    traced = grad.trace(*arguments(jnp.bfloat16))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == is_held
