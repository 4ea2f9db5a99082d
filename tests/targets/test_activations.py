"""An exact GELU between matmuls costs no more under autocast than in half by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxmp
from jaxmp.report import compile_for

pytestmark = [pytest.mark.targets, pytest.mark.slow]

LAYERS, TOKENS, WIDTH = 2, 16384, 768


def network(weights, x):
    for up, down in weights:
        x = x + jax.nn.gelu(x @ up, approximate=False) @ down
    return x


def step(fn, weights, x):
    def loss(weights):
        return jnp.mean(jnp.square(fn(weights, x).astype(jnp.float32)))

    grads = jax.grad(loss)(weights)
    return jax.tree.map(lambda w, g: w - 0.1 * g.astype(w.dtype), weights, grads)


def by_hand(weights, x):
    weights, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (weights, x))
    return network(weights, x)


@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v5p"])
def test_it_is_not_kept_in_float32(target):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    pair = array((WIDTH, 4 * WIDTH)), array((4 * WIDTH, WIDTH))
    args = (pair,) * LAYERS, array((TOKENS, WIDTH))
    costs = []
    for fn in (jaxmp.autocast(network), by_hand):
        compiled = compile_for(target, functools.partial(step, fn), *args)
        temp = compiled.memory_analysis().temp_size_in_bytes
        costs.append((temp, compiled.cost_analysis()["bytes accessed"]))
    (ours, our_bytes), (theirs, their_bytes) = costs
    print(f"{target}: temp {ours / 2**20:.0f} MiB, by hand {theirs / 2**20:.0f}")
    assert ours <= 1.02 * theirs
    assert our_bytes <= their_bytes
