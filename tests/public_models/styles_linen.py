"""Linen models, each written in one of the ways in which public code is.

They name their dtype everywhere, as public code does, and it is float32: nobody who
wrote them thought of a policy.
"""

import dataclasses
import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

WORDS, WIDTH = 64, 32


class ConfigDict:
    """Settings by attribute and by name, as ml_collections has them."""

    def __init__(self, settings: Any):
        self.settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("settings", {}):
            return self.settings[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "settings":
            super().__setattr__(name, value)
        else:
            self.settings[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def items(self) -> Any:
        return self.settings.items()


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 2
    heads: int = 2
    dtype: Any = jnp.float32


@flax.struct.dataclass
class StructConfig:
    layers: int = flax.struct.field(pytree_node=False, default=2)
    heads: int = flax.struct.field(pytree_node=False, default=2)
    dtype: Any = flax.struct.field(pytree_node=False, default=jnp.float32)


def settings() -> ConfigDict:
    return ConfigDict({"layers": 2, "heads": 2, "dtype": jnp.float32})


class RMSNorm(nn.Module):
    """By hand, in the dtype that it is told, as the language models have it."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        mean = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return jnp.asarray(x * jax.lax.rsqrt(mean + 1e-6) * scale, self.dtype)


class Attention(nn.Module):
    """Causal, by hand, with a mask of the least number of its dtype."""

    config: Any

    @nn.compact
    def __call__(self, x):
        dtype, heads = self.config.dtype, self.config.heads
        project = functools.partial(
            nn.DenseGeneral, features=(heads, WIDTH // heads), dtype=dtype
        )
        q, k, v = (project(name=name)(x) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(causal, scores, jnp.finfo(dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(dtype)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), dtype=dtype, name="out")(x)


class Block(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x, _=None):
        dtype = self.config.dtype
        x = x + Attention(self.config)(RMSNorm(dtype)(x))
        y = nn.LayerNorm(dtype=dtype)(x)
        y = nn.gelu(nn.Dense(4 * WIDTH, dtype=dtype)(y))
        return x + nn.Dense(WIDTH, dtype=dtype)(y), None


class LanguageModel(nn.Module):
    """With the configuration as a field; `loop` is how it goes over its blocks."""

    config: Any
    loop: str = "python"

    @nn.compact
    def __call__(self, words):
        config, dtype = self.config, self.config.dtype
        x = nn.Embed(WORDS, WIDTH, dtype=dtype)(words)
        x += nn.Embed(64, WIDTH, dtype=dtype)(jnp.arange(words.shape[1]))[None]
        block: Any = Block if self.loop == "python" else nn.remat(Block)
        if self.loop == "scan":
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=config.layers,
            )
            x, _ = block(config)(x, None)
        else:
            for _ in range(config.layers):
                x, _ = block(config)(x)
        x = nn.LayerNorm(dtype=dtype)(x)
        return nn.Dense(WORDS, dtype=dtype, use_bias=False)(x)


class Mixer(nn.Module):
    """Layers made by a partial of the module's own dtype."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        x = nn.Conv(WIDTH, (4, 4), (4, 4), dtype=self.dtype)(images)
        x = x.reshape(len(x), -1, WIDTH)
        for _ in range(2):
            y = jnp.swapaxes(norm()(x), 1, 2)
            y = dense(x.shape[1])(nn.gelu(dense(2 * WIDTH)(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            x = x + dense(WIDTH)(nn.gelu(dense(2 * WIDTH)(norm()(x))))
        return dense(10)(norm()(x).mean(1))


class InSetup(nn.Module):
    """Layers made in `setup`, with BatchNorm."""

    dtype: Any = jnp.float32

    def setup(self):
        self.convs = [nn.Conv(16, (3, 3), dtype=self.dtype) for _ in range(2)]
        self.norms = [
            nn.BatchNorm(use_running_average=False, dtype=self.dtype) for _ in range(2)
        ]
        self.head = nn.Dense(10, dtype=self.dtype)

    def __call__(self, images):
        x = images.astype(self.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.max_pool(nn.silu(norm(conv(x))), (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


class FieldDefault(nn.Module):
    """Which layer to use is a field, and its default is a partial with a dtype."""

    dense: Any = functools.partial(nn.Dense, dtype=jnp.float32)
    conv: Any = functools.partial(nn.Conv, dtype=jnp.float32, use_bias=False)

    @nn.compact
    def __call__(self, images):
        x = nn.silu(nn.LayerNorm()(self.conv(16, (3, 3), (2, 2))(images)))
        x = nn.silu(nn.LayerNorm()(self.conv(32, (3, 3), (2, 2))(x)))
        return self.dense(10)(x.mean((1, 2)))


class Feedforward(nn.Module):
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = jnp.asarray(x, self.dtype)
        y = nn.relu(nn.Dense(4 * self.width, dtype=self.dtype)(x))
        return x + nn.Dense(self.width, dtype=self.dtype)(y)


class ClassDefault(nn.Module):
    """Nobody hands a dtype down: each class has float32 for its default."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.LayerNorm()(Feedforward(x.shape[-1])(x))
        return nn.Dense(10)(x)


class WithLoss(nn.Module):
    """A language model that returns its loss, and has one table at both ends."""

    config: Config = Config()

    @nn.compact
    def __call__(self, words, targets):
        dtype = self.config.dtype
        table = nn.Embed(WORDS, WIDTH, dtype=dtype)
        x = table(words)
        for _ in range(self.config.layers):
            x, _ = Block(self.config)(x)
        logits = table.attend(nn.LayerNorm(dtype=dtype)(x))
        # Of the many words, one to a line, is the sum that has to be in float32.
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class GraphNet(nn.Module):
    """Messages along edges, summed where they arrive."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = dense(WIDTH)(nodes)
        for _ in range(2):
            edges = jnp.concatenate([x[senders], x[receivers]], -1)
            messages = dense(WIDTH)(nn.relu(dense(2 * WIDTH)(edges)))
            arrived = jax.ops.segment_sum(messages, receivers, len(nodes))
            degree = jax.ops.segment_sum(
                jnp.ones(len(receivers), self.dtype), receivers, len(nodes)
            )
            arrived = arrived / jnp.maximum(degree, 1)[:, None]
            y = dense(WIDTH)(jnp.concatenate([x, arrived], -1))
            x = nn.LayerNorm(dtype=self.dtype)(x + nn.relu(y))
        return dense(4)(x)


class ActorCritic(nn.Module):
    """Plays from pictures of bytes, with one trunk for policy and value."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, frames):
        conv = functools.partial(nn.Conv, dtype=self.dtype)
        x = frames.astype(self.dtype) / 255.0
        x = nn.relu(conv(16, (4, 4), (2, 2), name="conv_0")(x))
        x = nn.relu(conv(32, (3, 3), (2, 2), name="conv_1")(x))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(64, dtype=self.dtype, name="hidden")(x))
        logits = nn.Dense(6, dtype=self.dtype, name="logits")(x)
        value = nn.Dense(1, dtype=self.dtype, name="value")(x)
        return nn.log_softmax(logits), value[:, 0]
