"""GPT-2 (Radford et al., 2019), without dropout."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from models._job import Job, cross_entropy


class Block(nn.Module):
    """A transformer block that normalises before each half."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(h, mask=mask)
        x = x + h
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(h))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(h)


class GPT2(nn.Module):
    """Returns the logits of the following tokens; GPT-2 small by default."""

    vocabulary: int = 50257
    length: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="wte")
        positions = nn.Embed(self.length, self.width, dtype=self.dtype, name="wpe")
        x = table(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
        mask = nn.make_causal_mask(tokens, dtype=bool)
        for i in range(self.layers):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x, mask)
        return table.attend(nn.LayerNorm(dtype=self.dtype, name="ln")(x))


def batch(key, size, length, vocabulary):
    """Tokens, and the tokens that follow each of them."""
    tokens = jax.random.randint(key, (size, length + 1), 0, vocabulary)
    return (tokens[:, :-1],), tokens[:, 1:]


def loss(logits, labels):
    return cross_entropy(logits, labels).mean()


JOB = Job(
    model=GPT2,
    batch=functools.partial(batch, size=8, length=1024, vocabulary=50257),
    loss=loss,
    optimizer=optax.adamw(1e-4),
    shape="8 x 1024 tokens, AdamW",
)
TINY_JOB = Job(
    model=functools.partial(
        GPT2, vocabulary=64, length=16, width=32, layers=1, heads=2
    ),
    batch=functools.partial(batch, size=4, length=16, vocabulary=64),
    loss=loss,
    optimizer=optax.adamw(1e-3),
    shape="4 x 16 tokens, AdamW",
)
