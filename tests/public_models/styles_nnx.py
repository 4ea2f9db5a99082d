"""nnx models in the ways of public code: a dtype in every constructor."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

WORDS, WIDTH = 64, 32


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 2
    heads: int = 2
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


class RMSNorm(nnx.Module):
    """By hand, with a float32 mean, and back to the dtype of what it was given."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
        return (wide * self.scale[...]).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        dtypes: Any = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.norm_0 = RMSNorm(WIDTH)
        self.attention = nnx.MultiHeadAttention(
            config.heads, WIDTH, decode=False, **dtypes, rngs=rngs
        )
        self.norm_1 = nnx.LayerNorm(WIDTH, **dtypes, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, **dtypes, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, **dtypes, rngs=rngs)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]
        x = x + self.attention(self.norm_0(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_1(x))))


class LanguageModel(nnx.Module):
    """Its blocks are stacked by `nnx.vmap`, scanned and rematerialised.

    The table of words is used at both ends.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.config = config
        self.table = nnx.Embed(WORDS, WIDTH, dtype=config.dtype, rngs=rngs)
        self.blocks = stack(rngs)
        self.norm = nnx.LayerNorm(WIDTH, dtype=config.dtype, rngs=rngs)

    def __call__(self, words):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, block):
            return block(x)

        x = self.table(words).astype(self.config.dtype)
        return self.table.attend(self.norm(forward(x, self.blocks)))


class Adapted(nnx.Module):
    """Frozen layers with adapters of low rank."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.first = nnx.LoRALinear(
            WIDTH, 64, lora_rank=4, dtype=dtype, lora_dtype=dtype, rngs=rngs
        )
        frozen = nnx.Linear(64, 64, dtype=dtype, rngs=rngs)
        self.second = nnx.LoRA(64, 4, 64, base_module=frozen, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(64, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


class Decoder(nnx.Module):
    """One word at a time, with a cache of keys and values."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.table = nnx.Embed(WORDS, WIDTH, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, WIDTH, decode=True, dtype=dtype, rngs=rngs
        )
        self.attention.init_cache((4, 8, WIDTH), dtype=dtype)
        self.head = nnx.Linear(WIDTH, WORDS, dtype=dtype, rngs=rngs)

    def __call__(self, word):
        return self.head(self.attention(self.table(word)))


class ConvNet(nnx.Module):
    """With BatchNorm and Dropout, and a list of layers."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        sizes = ((3, 16), (16, 32))
        self.convs = nnx.List(
            [nnx.Conv(i, o, (3, 3), dtype=dtype, rngs=rngs) for i, o in sizes]
        )
        self.norms = nnx.List(
            [nnx.BatchNorm(o, dtype=dtype, rngs=rngs) for _, o in sizes]
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(32, 10, dtype=dtype, rngs=rngs)

    def __call__(self, images):
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(nnx.silu(norm(conv(x))), (2, 2), (2, 2))
        return self.head(self.dropout(x.mean((1, 2))))
