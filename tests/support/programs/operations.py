"""The operations and matmuls that random programs are made of."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.programs.values import added, mask, rows, weight_for


def _normed(x: jax.Array, center: bool) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True) if center else x
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1)


def _halves(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.concatenate([x[..., ::2], y[..., 1::2]], -1) if x.ndim else x + y


def _dropped(x: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(jax.random.key(x.size), 0.75, x.shape)
    return jnp.where(keep, x / 0.75, 0.0)


def _fifths(x: jax.Array) -> jax.Array:
    return (jnp.arange(x.size) * 3 % 5).reshape(x.shape).astype(x.dtype) / 5


# `f(x, y)`, with y of x's shape.
OPERATIONS = {
    "add": jnp.add,
    "add_in_call": lambda x, y: added(rows(x)[0, :16], rows(y)[-1, :16]),
    "sub": jnp.subtract,
    "gate": lambda x, y: x * jnp.tanh(y),
    "div": lambda x, y: x / (1 + y * y),
    "where": lambda x, y: jnp.where(mask(x), x, y),
    "maximum": jnp.maximum,
    "concatenate": _halves,
    "scores": lambda x, y: rows(x) @ rows(y).T / 3,
    "pairs": lambda x, y: jnp.einsum("ij,ik->jk", rows(x), rows(y)) / 4,
    "exp": lambda x, y: jnp.exp(jnp.tanh(x)),
    "log1p": lambda x, y: jnp.log1p(x * x),
    "tanh": lambda x, y: jnp.tanh(x),
    "sqrt": lambda x, y: jnp.sqrt(1 + x * x),
    "gelu": lambda x, y: jax.nn.gelu(x),
    "silu": lambda x, y: jax.nn.silu(x),
    "relu": lambda x, y: jax.nn.relu(x),
    "softmax": lambda x, y: jax.nn.softmax(rows(x)),
    "masked_softmax": lambda x, y: jax.nn.softmax(
        jnp.where(mask(rows(x)), -1e9, rows(x))
    ),
    "logsumexp": lambda x, y: jax.nn.logsumexp(rows(x), -1),
    "layer_norm": lambda x, y: _normed(rows(x), True),
    "rms_norm": lambda x, y: _normed(rows(x), False),
    "sum": lambda x, y: jnp.sum(rows(x), -1) / 4,
    "mean": lambda x, y: jnp.mean(rows(x), 0),
    "max": lambda x, y: jnp.max(rows(x), 0),
    "cumsum": lambda x, y: jnp.cumsum(rows(x), 0) / 4,
    "transpose": lambda x, y: rows(x).T,
    "reshape": lambda x, y: x.reshape(-1),
    "slice": lambda x, y: rows(x)[:2] * 1.5,
    "reverse": lambda x, y: x[::-1] if x.ndim else -x,
    "pad": lambda x, y: jnp.pad(rows(x), ((0, 1), (0, 0))),
    "lookup": lambda x, y: rows(x)[jnp.arange(4) % 2],
    "update": lambda x, y: rows(x).at[0].set(0.5),
    "segments": lambda x, y: jax.ops.segment_sum(
        rows(x), jnp.arange(len(rows(x))) // 2, num_segments=2
    ),
    "top_k": lambda x, y: lax.top_k(rows(x), 1)[0],
    "integers": lambda x, y: x + _fifths(x),
    "dropout": lambda x, y: _dropped(x),
    "stop_gradient": lambda x, y: x + lax.stop_gradient(x),
    "to_half_and_back": lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32),
    "to_half_by_part": lambda x, y: jnp.where(
        mask(x), x.astype(jnp.float16).astype(jnp.float32), x
    ),
    "promoted": lambda x, y: x.astype(jnp.bfloat16) * (1 + y * y),
    "float16_sum": lambda x, y: x.astype(jnp.float16).sum().astype(jnp.float32) / 32,
}

# What one who writes in half by hand computes in float32: sums, norms, softmaxes and
# exponentials. And what says itself in which precision it is.
IN_FLOAT32 = frozenset(
    [
        "exp",
        "log1p",
        "sqrt",
        "softmax",
        "masked_softmax",
        "logsumexp",
        "layer_norm",
        "rms_norm",
        "sum",
        "mean",
        "cumsum",
        "segments",
        "to_half_and_back",
        "to_half_by_part",
        "promoted",
        "float16_sum",
        "precise_matmul",
        "cast_matmul",
    ]
)


def _matmul(w: jax.Array, x: jax.Array) -> jax.Array:
    x = rows(x)
    return x @ weight_for(w, x)


def _precise_matmul(w: jax.Array, x: jax.Array) -> jax.Array:
    x = rows(x)[:, :8]
    return jnp.dot(x, w[: x.shape[-1]], precision="highest")


def _permuted(w: jax.Array, x: jax.Array) -> jax.Array:
    """By a matrix of integers, with more to do for `w`."""
    x = rows(x)
    count = x.shape[-1]
    return x @ jnp.roll(jnp.eye(count, dtype=int), 1, 0) @ weight_for(w, x)


def _picked(w: jax.Array, x: jax.Array) -> jax.Array:
    """By booleans, from the left."""
    x = rows(x)
    picks = jnp.arange(2 * len(x)).reshape(2, -1) % 3 > 0
    return lax.dot(picks, x @ weight_for(w, x)) / len(x) ** 0.5


def _routed(w: jax.Array, x: jax.Array) -> jax.Array:
    """Each row by one of two weights, which an integer mask names."""
    x = rows(x)
    weights = jnp.stack([weight_for(w, x), -weight_for(w, x)])
    route = jax.nn.one_hot(jnp.arange(len(x)) % 2, 2, dtype=int)
    return jnp.einsum("be,bd,edf->bf", route, x, weights)


def _cast_matmul(w: jax.Array, x: jax.Array) -> jax.Array:
    """What is cast to float32 keeps the matmul that reads it."""
    x = rows(x).astype(jnp.bfloat16).astype(jnp.float32)
    return (2 * x) @ weight_for(w, x) / 2


def _promoted_matmul(w: jax.Array, x: jax.Array) -> jax.Array:
    x = rows(x)
    return x.astype(jnp.bfloat16) @ weight_for(w, x)


# `f(w, x)`, a product with as much of the weight as fits.
MATMULS = {
    "matmul": _matmul,
    "precise_matmul": _precise_matmul,
    "integer_matmul": _permuted,
    "boolean_matmul": _picked,
    "routed_matmul": _routed,
    "cast_matmul": _cast_matmul,
    "promoted_matmul": _promoted_matmul,
}
