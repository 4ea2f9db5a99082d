"""ReLU and pooling by maximum only pick numbers: they run in half before a matmul.

Rounding keeps the order of numbers, so that it may come before them; elsewhere it may
not, because what follows does arithmetic with what they pick.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmp
from jaxmp.casting import OpRule
from jaxmp.testing import equations

W = jax.random.normal(jax.random.key(0), (8, 8)) / 2
X = 3 * jax.random.normal(jax.random.key(1), (4, 8))
PICKS = {"max", "min", "clamp", "reduce_window_max"}


def norm(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-3)


def pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")


def before_a_matmul(pick):
    return lambda w, x: pick(norm(x @ w)) @ w


IN_HALF = {
    "relu": before_a_matmul(jax.nn.relu),
    "relu6": before_a_matmul(jax.nn.relu6),
    "maximum": before_a_matmul(lambda x: jnp.maximum(x, 0.25)),
    "minimum": before_a_matmul(lambda x: jnp.minimum(0.25, x)),
    "clip": before_a_matmul(lambda x: jnp.clip(x, -1, 1)),
    "clip to integers": before_a_matmul(lambda x: jnp.clip(x, 0, 6)),
    "clamp": before_a_matmul(lambda x: lax.clamp(-1.0, x, 1.0)),
    "pool": before_a_matmul(pool),
    "relu, pool": before_a_matmul(lambda x: pool(jax.nn.relu(x))),
    "relu, transpose": lambda w, x: w @ jax.nn.relu(norm(x @ w)).T,
    "jitted": before_a_matmul(jax.jit(lambda x: pool(jax.nn.relu(x)))),
    "checkpoint": lambda w, x: jax.checkpoint(before_a_matmul(jax.nn.relu))(w, x),
    "scan": lambda w, x: lax.scan(
        lambda h, _: (before_a_matmul(jax.nn.relu)(w, h), None), x, None, 2
    )[0],
    "vmap": lambda w, x: jax.vmap(before_a_matmul(jax.nn.relu), (None, 0))(
        w, x[:, None]
    ),
}
IN_FLOAT32 = {
    "divided by a norm that is kept from zero": lambda w, x: (
        (x / jnp.maximum(jnp.sqrt(jnp.square(x @ w).sum(-1, keepdims=True)), 1e-6)) @ w
    ),
    "scaled after": lambda w, x: (jax.nn.relu(norm(x @ w)) * 0.3 + 0.1) @ w,
    "no matmul after": lambda w, x: jax.nn.relu(norm(x @ w)).sum(),
    "of two arrays": lambda w, x: jnp.maximum(norm(x @ w), norm(x @ w.T) - 1) @ w,
    "a variance that is kept from below zero": lambda w, x: (
        (
            (x @ w)
            * lax.rsqrt(jnp.maximum(jnp.square(x @ w).mean(-1, keepdims=True), 0.0))
        )
        @ w
    ),
    "softmax": lambda w, x: jax.nn.softmax(jnp.square(x @ w)) @ w,
}


def picks(fn, policy="mixed_bfloat16", **options):
    """The dtypes in which a function under autocast picks numbers."""
    cast = jaxmp.autocast(fn, policy, **options)
    eqns = [e for _, e in equations(jax.make_jaxpr(cast)(W, X))]
    return {str(e.outvars[0].aval.dtype) for e in eqns if e.primitive.name in PICKS}


@pytest.mark.parametrize("name", IN_HALF)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_in_half_where_a_matmul_reads_it(name, policy):
    assert picks(IN_HALF[name], policy) == {policy.removeprefix("mixed_")}


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_in_float32_where_arithmetic_follows(name):
    assert picks(IN_FLOAT32[name]) == {"float32"}


@pytest.mark.parametrize("name", sorted(set(IN_HALF) - {"checkpoint", "scan"}))
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_result_is_that_of_picking_in_float32(name, policy):
    fn = IN_HALF[name]
    eqns = [e for _, e in equations(jax.make_jaxpr(fn)(W, X))]
    used = {e.primitive.name for e in eqns} & PICKS
    rules = [OpRule(primitive=pick, compute="float32") for pick in sorted(used)]
    assert picks(fn, policy, rules=rules) == {"float32"}
    half = jax.jit(jaxmp.autocast(fn, policy))(W, X)
    full = jax.jit(jaxmp.autocast(fn, policy, rules=rules))(W, X)
    np.testing.assert_array_equal(half, full)


def test_a_limit_that_float16_cannot_hold_stays_in_float32():
    fn = before_a_matmul(lambda x: jnp.minimum(x, 1e6))
    assert picks(fn, "mixed_float16") == {"float32"}
    assert picks(fn, "mixed_bfloat16") == {"bfloat16"}
