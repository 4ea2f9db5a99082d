"""What the parts of random programs do with values of any shape."""

import jax
import jax.numpy as jnp


def rows(x: jax.Array) -> jax.Array:
    """At least two dimensions, for what needs rows."""
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)


def mask(x: jax.Array) -> jax.Array:
    """True for every third entry."""
    return (jnp.arange(x.size) % 3 == 0).reshape(x.shape)


def fit(y: jax.Array, x: jax.Array) -> jax.Array:
    """A value in the shape of another."""
    if y.shape == x.shape:
        return y
    if y.size == x.size:
        return y.reshape(x.shape)
    return jnp.broadcast_to(jnp.mean(y), x.shape)


def weight_for(w: jax.Array, x: jax.Array) -> jax.Array:
    """As much of the weight, over and over, as there are columns to multiply."""
    return jnp.tile(w, (-(-x.shape[-1] // 8), 1))[: x.shape[-1]]


added = jax.jit(jnp.add)
"""A call that all who write it share: JAX traces it once for a shape."""
