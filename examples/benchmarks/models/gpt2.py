"""GPT-2 (Radford et al., 2019), without dropout."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from gpt2_sizes import SMALL, TINY, AdamW, Sizes

from models._job import Job, mean_cross_entropy


class Block(nn.Module):
    """A transformer block that normalises before each half."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(h, mask=mask)
        x = x + h
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(h))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(h)


class GPT2(nn.Module):
    """Returns the logits of the following tokens; GPT-2 small by default."""

    vocabulary: int = SMALL.vocabulary
    length: int = SMALL.length
    width: int = SMALL.width
    layers: int = SMALL.layers
    heads: int = SMALL.heads
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="wte")
        positions = nn.Embed(self.length, self.width, dtype=self.dtype, name="wpe")
        x = table(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
        mask = nn.make_causal_mask(tokens, dtype=bool)
        for i in range(self.layers):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x, mask)
        return table.attend(nn.LayerNorm(dtype=self.dtype, name="ln")(x))


def batch(
    key: jax.Array, size: int, length: int, vocabulary: int
) -> tuple[tuple[jax.Array], jax.Array]:
    """Random tokens, [size, length], and the token that follows each of them."""
    tokens = jax.random.randint(key, (size, length + 1), 0, vocabulary)
    return (tokens[:, :-1],), tokens[:, 1:]


def make_job(
    size: int, length: int, *, rate: float = AdamW().rate, **sizes: int
) -> Job:
    """A GPT-2 on batches of `size` sequences of `length` tokens.

    Args:
      size: sequences in a batch.
      length: tokens in a sequence, and positions that the model knows.
      rate: learning rate of AdamW.
      **sizes: other fields of `GPT2`; GPT-2 small's by default.
    """
    all_sizes = Sizes(size, length, **sizes)
    vocabulary = all_sizes.vocabulary
    rate, b1, b2, eps, weight_decay = AdamW(rate)
    return Job(
        model=functools.partial(GPT2, length=length, **sizes),
        batch=functools.partial(batch, size=size, length=length, vocabulary=vocabulary),
        loss=mean_cross_entropy,
        optimizer=optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay),
        shape=all_sizes.shape,
    )


_TINY = TINY._asdict()
JOB = make_job(SMALL.batch, SMALL.length)
TINY_JOB = make_job(_TINY.pop("batch"), rate=1e-3, **_TINY)
