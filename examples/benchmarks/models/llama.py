"""LLaMA (Touvron et al., 2023) as plain functions, its layers in one loop.

Source of the sizes: https://arxiv.org/abs/2302.13971, table 2, and its code
(github.com/meta-llama/llama, llama/model.py): a hidden layer of two thirds of 4 x 4096,
rounded up to a multiple of 256.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Llama(NamedTuple):
    """The sizes of a LLaMA; by default those of the model of 6.7 billion weights."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000

    def shapes(self) -> dict[str, Any]:
        """The shapes of all weights, which in a layer begin with an axis of layers."""
        square, up = (self.width, self.width), (self.width, self.hidden)
        layer = dict.fromkeys("qkvo", square) | {"gate": up, "up": up, "down": up[::-1]}
        norms = dict.fromkeys(("norm_1", "norm_2"), (self.width,))
        return {
            "table": (self.vocabulary, self.width),
            "layers": {n: (self.layers, *s) for n, s in (layer | norms).items()},
            "norm": (self.width,),
            "head": (self.width, self.vocabulary),
        }

    def params(self, dtype: Any) -> dict[str, Any]:
        """All weights in a dtype, as shapes."""
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, dtype),
            self.shapes(),
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def __call__(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits, `[batch, length, vocabulary]`; layers are computed again backward."""

        def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            h = rms_norm(x, w["norm_1"])
            q, k, v = (split(h @ w[name], self.heads) for name in "qkv")
            attended = jax.nn.dot_product_attention(
                rotate(q), rotate(k), v, is_causal=True
            )
            x = x + attended.reshape(x.shape) @ w["o"]
            h = rms_norm(x, w["norm_2"])
            return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

        x = params["table"][tokens]
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
        return rms_norm(x, params["norm"]) @ params["head"]


def split(x: jax.Array, heads: int) -> jax.Array:
    """`[batch, length, width]` to `[batch, length, heads, width of a head]`."""
    return x.reshape(*x.shape[:2], heads, -1)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides by the root of the mean square, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * scale.astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions (Su et al., 2021) of `[batch, length, heads, width]`."""
    length, width = x.shape[1], x.shape[3]
    rates = 1e4 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
