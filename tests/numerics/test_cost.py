"""What it costs to look into a network of the shape of GPT-2, printed with `-s`."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxmp.numerics import find_nonfinite, trace


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(num_heads=4, name="attn")
        x = x + attention(nn.LayerNorm(name="ln_1")(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="ln_2")(x)))
        return x + nn.Dense(width, name="down")(y)


class GPT2(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(512, 64, name="wte")
        positions = nn.Embed(64, 64, name="wpe")(jnp.arange(tokens.shape[1]))
        x = embed(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for i in range(self.layers):
            x = Block(name=f"h_{i}")(x, mask)
        return embed.attend(nn.LayerNorm(name="ln_f")(x))


def network(layers):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 512, (2, 64)))
    model = GPT2(layers)

    def filled(x):
        return jnp.asarray(rng.normal(size=x.shape) / 8, x.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params = jax.tree.map(filled, shapes)

    def loss(params, tokens):
        logits = model.apply(params, tokens).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], tokens[:, 1:]
        )
        return losses.mean()

    return loss, params, tokens


def seconds(run):
    """CPU seconds, which a busy machine does not stretch."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_twelve_layers_take_less_than_a_minute(policy):
    loss, params, tokens = network(12)
    for name, run in {
        "trace": lambda: trace(loss, policy, loss_scale=1024)(params, tokens),
        "find_nonfinite": lambda: find_nonfinite(
            loss, params, tokens, policy=policy, loss_scale=1024
        ),
    }.items():
        jax.clear_caches()
        first, _ = seconds(run)
        again, _ = seconds(run)
        print(f"{name}, {policy}: {first:.1f} s, again {again:.1f} s of CPU")
        assert first < 60


@pytest.mark.slow
def test_cost_is_linear_in_the_operations():
    spent, rows = {}, {}
    for layers in (6, 12):
        loss, params, tokens = network(layers)
        run = trace(loss)
        run(params, tokens)  # compiles
        spent[layers], traced = seconds(functools.partial(run, params, tokens))
        rows[layers] = len(traced.rows)
    print(f"CPU seconds: {spent}, operations: {rows}")
    assert 1.8 < rows[12] / rows[6] < 2.2
    assert spent[12] < 3 * spent[6]
