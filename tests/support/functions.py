"""Plain JAX functions of every sort, to cross with properties as the zoo is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


class PlainFunction(NamedTuple):
    """A function of parameters and inputs.

    Attributes:
      name: what it shows.
      fn: `fn(w, x)`, with `w` a float32 `(8, 8)` and `x` a float32 `(4, 8)` array.
      has_matmul: whether there is one, and all of them are meant for half.
    """

    name: str
    fn: Callable[[Any, Any], Any]
    has_matmul: bool = True


def _mlp(w, x):
    return jax.nn.gelu(x @ w) @ w


def _gated(w, x):
    return (jax.nn.silu(x @ w) * (x @ w.T)) @ w


def _rms_norm(w, x):
    h = x @ w
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) @ w


def _layer_norm(w, x):
    h = x @ w
    h = h + jax.nn.standardize(h) @ w
    return (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-3) @ w


def _attention(w, x):
    q, k = x @ w, x @ w.T
    scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), q @ k.T / 3.0, -1e9)
    return jax.nn.softmax(scores) @ (x @ w) + x


def _cross_entropy(w, x):
    logits = x @ w
    picked = jnp.take_along_axis(logits, jnp.arange(4)[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def _convolution(w, x):
    image = (x @ w).reshape(1, 4, 8, 1)
    kernel = w[:3, :3].reshape(3, 3, 1, 1)
    dims = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dims)
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")


def _embedding(w, x):
    return jnp.tanh(w[jnp.array([1, 1, 3, 7])] + x) @ w


def _dropout(w, x):
    h = x @ w
    keep = jax.random.bernoulli(jax.random.key(0), 0.8, h.shape)
    return jnp.where(keep, h / 0.8, 0.0) @ w


def _residual_scan(w, x):
    def body(h, scale):
        return h + jnp.tanh(h * scale @ w), h.mean()

    return lax.scan(body, x @ w, jnp.linspace(0.1, 1.0, 5), reverse=True, unroll=2)


def _lstm_scan(w, x):
    def body(carry, x):
        c, h = carry
        gate = jax.nn.sigmoid(x + h @ w)
        c = gate * c + (1 - gate) * jnp.tanh(h @ w.T + x)
        return (c, jnp.tanh(c)), h

    return lax.scan(body, (jnp.zeros(8), jnp.zeros(8)), x)


def _running_sum(w, x):
    def body(total, row):
        return total + (row @ w).sum(), None

    return lax.scan(body, jnp.float32(0), jnp.tile(x, (16, 1)))[0]


def _fori(w, x):
    return lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ w) + i, x)


def _while(w, x):
    def body(carry):
        i, h, total = carry
        return i + 1, jnp.tanh(h @ w), total + h.sum()

    return lax.while_loop(lambda carry: carry[0] < 4, body, (0, x, 0.0))


def _branches(w, x):
    def branch(h):
        return lax.cond(h.sum() > 0, lambda h: h @ w, lambda h: jax.nn.softmax(h), h)

    fns = [branch, lambda h: h, lambda h: jnp.zeros_like(h)]
    return sum(lax.switch(i, fns, x @ w) for i in range(3))


def _remat(w, x):
    @jax.checkpoint
    def block(w, h):
        return h + jax.nn.gelu(h @ w) @ w

    return block(w, block(w, x @ w)) @ w


def _remat_policy(w, x):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def block(h, w):
        return h + checkpoint_name(jnp.tanh(h @ w), "hidden") @ w, None

    block = jax.checkpoint(block, policy=policy)
    return lax.scan(block, x @ w, jnp.stack([w, w.T]))[0] @ w


@jax.custom_jvp
def _times_seven(x, w):
    return x @ w


@_times_seven.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 7 * (dx @ w + x @ dw)


@jax.custom_vjp
def _times_three(x, w):
    return jnp.exp(x @ w * 0.1)


def _times_three_forward(x, w):
    y = _times_three(x, w)
    return y, (x, w, y)


def _times_three_backward(residuals, dy):
    x, w, y = residuals
    dz = 0.3 * dy * y
    return dz @ w.T, x.T @ dz


_times_three.defvjp(_times_three_forward, _times_three_backward)


def _custom_rules(w, x):
    return _times_three(_times_seven(jax.nn.relu(x @ w), w), w)


def _nested(w, x):
    inner = jax.jit(lambda h, w: jax.nn.softplus(h @ w))
    batched = jax.vmap(inner, in_axes=(0, None))
    return batched(jnp.stack([x, x + 1]), w) @ w


def _routing(w, x):
    weights, experts = lax.top_k(jax.nn.softmax(x @ w), 2)
    outputs = jnp.einsum("bd,edf->bef", x, jnp.stack([w, w.T, w + 1, w - 1] * 2))
    picked = jnp.take_along_axis(outputs, experts[:, :, None], axis=1)
    return (weights[:, :, None] * picked).sum(1)


def _segment_sum(w, x):
    return jax.ops.segment_sum(x @ w, jnp.array([0, 0, 1, 0]), num_segments=2)


def _scan_sum(w, x):
    del w
    return jnp.cumsum(x, axis=0), lax.scan(lambda c, r: (c + r, c), x[0], x)[0]


FUNCTIONS = (
    PlainFunction("mlp", _mlp),
    PlainFunction("gated", _gated),
    PlainFunction("rms_norm", _rms_norm),
    PlainFunction("layer_norm", _layer_norm),
    PlainFunction("attention", _attention),
    PlainFunction("cross_entropy", _cross_entropy),
    PlainFunction("convolution", _convolution),
    PlainFunction("embedding", _embedding),
    PlainFunction("dropout", _dropout),
    PlainFunction("residual_scan", _residual_scan),
    PlainFunction("lstm_scan", _lstm_scan),
    PlainFunction("running_sum", _running_sum),
    PlainFunction("fori", _fori),
    PlainFunction("while", _while),
    PlainFunction("branches", _branches),
    PlainFunction("remat", _remat),
    PlainFunction("remat_policy", _remat_policy),
    PlainFunction("custom_rules", _custom_rules),
    PlainFunction("nested", _nested),
    PlainFunction("routing", _routing),
    PlainFunction("segment_sum", _segment_sum),
    PlainFunction("scan_sum", _scan_sum, has_matmul=False),
)
"""Every function of the list; those of `while` loops have no reverse derivative."""


def example_arguments() -> tuple[jax.Array, jax.Array]:
    """Parameters `(8, 8)` and inputs `(4, 8)` for every function of the list."""
    keys = jax.random.split(jax.random.key(7))
    w = jax.random.normal(keys[0], (8, 8)) / 8**0.5
    return w, jax.random.normal(keys[1], (4, 8))
