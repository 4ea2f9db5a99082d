"""BERT (Devlin et al., 2018) with its masked language model, without dropout.

The layers are those of `FlaxBertForMaskedLM` in Hugging Face's Transformers: every
position is decoded, with the table of the embeddings.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from models._job import Job, cross_entropy

MASK_SHARE = 0.15
gelu = functools.partial(nn.gelu, approximate=False)


class Block(nn.Module):
    """A transformer block that normalises after each half."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12, dtype=self.dtype)
        h = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(x, mask=mask)
        x = norm()(x + h)
        h = gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(x))
        return norm()(x + nn.Dense(x.shape[-1], dtype=self.dtype)(h))


class Bert(nn.Module):
    """Returns the logits of the token at every position; BERT-Base by default."""

    vocabulary: int = 30522
    length: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    dtype: Any = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, segments: jax.Array, is_token: jax.Array
    ) -> jax.Array:
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12, dtype=self.dtype)
        table = embed(self.vocabulary, name="tokens")
        positions = embed(self.length, name="positions")
        x = table(tokens) + embed(2, name="segments")(segments)
        x = norm()(x + positions(jnp.arange(tokens.shape[1]))[None])
        mask = nn.make_attention_mask(is_token, is_token, dtype=bool)
        for i in range(self.layers):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x, mask)
        x = norm()(gelu(nn.Dense(self.width, dtype=self.dtype)(x)))
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        logits = table.attend(x)
        return logits + bias.astype(logits.dtype)[None, None]


def batch(
    key: jax.Array, size: int, length: int, vocabulary: int
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Tokens, segments and what is a token; labels, -1 where none is asked for."""
    asked, tokens = jax.random.split(key)
    asked = jax.random.bernoulli(asked, MASK_SHARE, (size, length))
    tokens = jax.random.randint(tokens, (size, length), 1, vocabulary)
    inputs = jnp.where(asked, 0, tokens), jnp.zeros_like(tokens), jnp.ones_like(tokens)
    return inputs, jnp.where(asked, tokens, -1)


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    asked = labels >= 0
    losses = cross_entropy(logits, jnp.where(asked, labels, 0))
    return jnp.sum(losses, where=asked) / jnp.sum(asked)


JOB = Job(
    model=Bert,
    batch=functools.partial(batch, size=32, length=512, vocabulary=30522),
    loss=loss,
    optimizer=optax.adamw(1e-4),
    shape="32 x 512 tokens, AdamW",
)
TINY_JOB = Job(
    model=functools.partial(
        Bert, vocabulary=64, length=16, width=32, layers=1, heads=2
    ),
    batch=functools.partial(batch, size=4, length=16, vocabulary=64),
    loss=loss,
    optimizer=optax.adamw(1e-3),
    shape="4 x 16 tokens, AdamW",
)
