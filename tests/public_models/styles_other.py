"""Models that Flax did not make: Equinox, Haiku, and plain functions."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

WIDTH = 32


class EquinoxBlock(eqx.Module):
    norm_0: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm_1: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: Any):
        first, second = jax.random.split(key)
        self.norm_0 = self.norm_1 = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 64, 1, jax.nn.gelu, key=second)

    def __call__(self, x):
        y = jax.vmap(self.norm_0)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm_1)(x))


class EquinoxViT(eqx.Module):
    patches: eqx.nn.Conv2d
    positions: jax.Array
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, key: Any):
        keys = jax.random.split(key, 5)
        self.patches = eqx.nn.Conv2d(3, WIDTH, 4, 4, key=keys[0])
        self.positions = 0.1 * jax.random.normal(keys[1], (17, WIDTH))
        self.blocks = [EquinoxBlock(key) for key in keys[2:4]]
        self.head = eqx.nn.Linear(WIDTH, 10, key=keys[4])

    def __call__(self, image):
        x = self.patches(image).reshape(WIDTH, -1).T
        x = jnp.concatenate([jnp.zeros((1, WIDTH)), x]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[0])


def haiku_net(images: Any) -> Any:
    """A residual net; to be called within `haiku.transform`."""
    import haiku as hk

    x = hk.Conv2D(16, 3, stride=2)(images)
    for _ in range(2):
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.Conv2D(16, 3)(jax.nn.silu(y))
    x = jnp.mean(jax.nn.silu(x), (1, 2))
    return hk.nets.MLP([64, 10])(x)


def radiance_shapes() -> dict[str, Any]:
    """The weights of `radiance`."""
    sizes = ((30, 64), (64, 64), (94, 64))
    shapes = {f"layer_{i}": size for i, size in enumerate(sizes)}
    shapes |= {"density": (64, 1), "color": (64, 3)}
    return {
        name: {
            "kernel": jax.ShapeDtypeStruct(size, jnp.float32),
            "bias": jax.ShapeDtypeStruct(size[1:], jnp.float32),
        }
        for name, size in shapes.items()
    }


def radiance(params: Any, points: Any, distances: Any) -> Any:
    """Renders rays through a field of density and color.

    Args:
      params: of the shapes of `radiance_shapes`.
      points: float array (rays, samples, 3), where the field is asked.
      distances: float array (rays, samples) between them.

    Returns:
      Colors, (rays, 3).
    """

    def dense(name: str, x: Any) -> Any:
        return x @ params[name]["kernel"] + params[name]["bias"]

    octaves = 2.0 ** jnp.arange(5)
    angles = (points[..., None, :] * octaves[:, None]).reshape(*points.shape[:2], -1)
    encoded = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    x = jax.nn.relu(dense("layer_0", encoded))
    x = jax.nn.relu(dense("layer_1", x))
    x = jax.nn.relu(dense("layer_2", jnp.concatenate([x, encoded], -1)))
    density = jax.nn.softplus(dense("density", x))[..., 0]
    color = jax.nn.sigmoid(dense("color", x))
    absorbed = density * distances
    # Light that has come so far: a sum along the ray, in an exponential.
    arriving = jnp.exp(-(jnp.cumsum(absorbed, -1) - absorbed))
    return jnp.sum((arriving * (1 - jnp.exp(-absorbed)))[..., None] * color, 1)
