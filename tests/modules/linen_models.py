"""Linen networks of every build, for the tests of `apply_policy`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
HALF = "params=float32,compute=bfloat16,output=bfloat16"
X = jnp.linspace(-1, 1, 32).reshape(4, 8)
KEY = jax.random.key(0)


class Encoder(nn.Module):
    def setup(self):
        self.dense = nn.Dense(8)
        self.norm = nn.LayerNorm()

    def __call__(self, x):
        return self.norm(self.dense(x))


class Model(nn.Module):
    """With setup; layers in a field, a list and a dictionary."""

    activation: str = "relu"

    def setup(self):
        self.encoder = Encoder()
        self.blocks = [nn.Dense(8), nn.Dense(8)]
        self.heads = {"a": nn.Dense(2), "b": nn.Dense(3)}
        self.dropout = nn.Dropout(0.5)

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x, train=False):
        x = self.encode(x)
        for block in self.blocks:
            x = getattr(nn, self.activation)(block(x))
        x = self.dropout(x, deterministic=not train)
        return self.heads["a"](x), self.heads["b"](x)


class Compact(nn.Module):
    """The layers of a network with `@nn.compact`, and a parameter of its own."""

    layer: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = nn.LayerNorm(name="norm")(x * jnp.broadcast_to(scale, x.shape))
        layer = self.layer or nn.Dense(8, name="layer")
        return layer(x)


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b))
