"""More linen models in the ways of public code: pictures, speech, experts, tables."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH = 32


def timestep_embedding(times: Any, width: int, dtype: Any) -> Any:
    """Sines and cosines of times up to a thousand, which half cannot tell apart."""
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(width // 2) / (width // 2))
    angles = times.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).astype(dtype)


class ResidualBlock(nn.Module):
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, time):
        conv = functools.partial(nn.Conv, self.features, dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, 4, dtype=self.dtype)
        y = conv((3, 3), name="conv_0")(nn.silu(norm()(x)))
        y += nn.Dense(self.features, dtype=self.dtype)(nn.silu(time))[:, None, None]
        y = conv((3, 3), name="conv_1")(nn.silu(norm()(y)))
        if x.shape[-1] != self.features:
            x = conv((1, 1), name="shortcut")(x)
        return x + y


class UNet(nn.Module):
    """Predicts the noise of a diffusion step."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, times):
        time = timestep_embedding(times, WIDTH, self.dtype)
        time = nn.Dense(WIDTH, dtype=self.dtype)(time)
        time = nn.Dense(WIDTH, dtype=self.dtype)(nn.silu(time))
        x = nn.Conv(16, (3, 3), dtype=self.dtype)(images)
        first = ResidualBlock(16, self.dtype)(x, time)
        x = nn.Conv(32, (3, 3), (2, 2), dtype=self.dtype)(first)
        x = ResidualBlock(32, self.dtype)(x, time)
        flat = nn.GroupNorm(4, dtype=self.dtype)(x).reshape(len(x), -1, 32)
        flat = nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(flat)
        x = x + flat.reshape(x.shape)
        x = jax.image.resize(x, (*first.shape[:3], 32), "nearest")
        x = ResidualBlock(16, self.dtype)(jnp.concatenate([x, first], -1), time)
        x = nn.silu(nn.GroupNorm(4, dtype=self.dtype)(x))
        return nn.Conv(3, (3, 3), dtype=self.dtype)(x)


class Experts(nn.Module):
    """Each word goes to the two experts that its router likes best."""

    experts: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        width = x.shape[-1]
        logits = nn.Dense(self.experts, dtype=self.dtype, name="router")(x)
        gates = jax.nn.softmax(logits.astype(jnp.float32))
        best, chosen = jax.lax.top_k(gates, 2)
        routes = jax.nn.one_hot(chosen, self.experts) * best[..., None]
        routes = routes.sum(-2).astype(self.dtype)
        initial = nn.initializers.lecun_normal(batch_axis=(0,))
        up = self.param("up", initial, (self.experts, width, 2 * width))
        down = self.param("down", initial, (self.experts, 2 * width, width))
        y = jnp.einsum("bd,edh->ebh", x, up.astype(self.dtype))
        y = jnp.einsum("ebh,ehd->ebd", nn.gelu(y), down.astype(self.dtype))
        x = nn.LayerNorm(dtype=self.dtype)(x + jnp.einsum("be,ebd->bd", routes, y))
        balance = self.experts * jnp.sum(gates.mean(0) ** 2)
        return nn.Dense(10, dtype=self.dtype, name="head")(x), balance


class Speech(nn.Module):
    """Convolutions, a recurrence in both directions, letters by CTC."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, sound):
        x = nn.Conv(WIDTH, (5,), (2,), dtype=self.dtype)(sound)
        x = nn.LayerNorm(dtype=self.dtype)(nn.relu(x))
        forward = nn.RNN(nn.GRUCell(WIDTH, dtype=self.dtype))
        backward = nn.RNN(nn.GRUCell(WIDTH, dtype=self.dtype))
        return nn.Dense(8, dtype=self.dtype)(nn.Bidirectional(forward, backward)(x))


class Volumes(nn.Module):
    """Segments a scan in three dimensions."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, volumes):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3, 3), dtype=self.dtype)
        x = conv(8)(volumes)
        x = nn.relu(nn.GroupNorm(2, dtype=self.dtype)(x))
        x = conv(16, strides=(2, 2, 2))(x)
        x = nn.relu(nn.GroupNorm(2, dtype=self.dtype)(x))
        x = nn.ConvTranspose(8, (2, 2, 2), (2, 2, 2), dtype=self.dtype)(x)
        return nn.Conv(3, (1, 1, 1), dtype=self.dtype)(x)


class Recommender(nn.Module):
    """Bags of ids in big tables, their products with one another, and an MLP."""

    sizes: tuple[int, ...] = (20000, 5000, 100)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids, numbers):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        fields = [dense(16, name="bottom")(numbers)]
        for i, size in enumerate(self.sizes):
            table = nn.Embed(size, 16, dtype=self.dtype, name=f"table_{i}")
            fields.append(table(ids[:, i] % size).sum(1))
        stacked = jnp.stack(fields, 1)
        products = jnp.einsum("bid,bjd->bij", stacked, stacked)
        x = jnp.concatenate([fields[0], products.reshape(len(ids), -1)], -1)
        x = nn.relu(dense(64, name="top")(x))
        return dense(1, name="head")(x)[:, 0]
