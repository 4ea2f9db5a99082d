"""ResNet-50 (He et al., 2015) with its strides as in Flax's ImageNet example."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from models._job import Job, mean_cross_entropy


class Bottleneck(nn.Module):
    """Three convolutions around a residual connection."""

    filters: int
    strides: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=self.dtype
        )
        h = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        h = nn.relu(norm()(conv(self.filters, (3, 3), (self.strides,) * 2)(h)))
        h = norm(scale_init=nn.initializers.zeros)(conv(4 * self.filters, (1, 1))(h))
        if x.shape != h.shape:
            x = norm()(conv(4 * self.filters, (1, 1), (self.strides,) * 2)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    """Returns the logits of the classes; ResNet-50 by default."""

    classes: int = 1000
    width: int = 64
    stages: tuple[int, ...] = (3, 4, 6, 3)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=self.dtype)(x)
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2**stage, strides, self.dtype)(x)
        return nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


def batch(
    key: jax.Array, size: int, length: int, classes: int
) -> tuple[tuple[jax.Array], jax.Array]:
    """Random images, [size, length, length, 3], and their classes."""
    images, labels = jax.random.split(key)
    images = jax.random.normal(images, (size, length, length, 3))
    return (images,), jax.random.randint(labels, (size,), 0, classes)


JOB = Job(
    model=ResNet,
    batch=functools.partial(batch, size=64, length=224, classes=1000),
    loss=mean_cross_entropy,
    optimizer=optax.sgd(0.1, momentum=0.9),
    shape="64 images of 224 x 224, SGD with momentum",
)
TINY_JOB = Job(
    model=functools.partial(ResNet, classes=10, width=8, stages=(1, 1)),
    batch=functools.partial(batch, size=8, length=32, classes=10),
    loss=mean_cross_entropy,
    optimizer=optax.sgd(0.01, momentum=0.9),
    shape="8 images of 32 x 32, SGD with momentum",
)
