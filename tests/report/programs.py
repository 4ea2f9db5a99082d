"""Small programs whose FLOPs, bytes and buffers can be counted by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


class Case(NamedTuple):
    """A step, its arguments and the FLOPs of its matmuls, by hand."""

    step: Any
    args: tuple[Any, ...]
    flops: float


def mlp_step(params, x):
    def loss(params):
        hidden = jnp.tanh(x @ params["a"])
        return jnp.mean((hidden @ params["b"]) ** 2)

    grads = jax.grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


MLP_PARAMS = {"a": array(64, 128), "b": array(128, 32)}


def scan(w, x):
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, None, 7)[0]


def convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def padded_convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def branch(flag, w, x):
    return jax.lax.cond(flag, lambda: x @ w, lambda: x)


CASES = {
    "matmul": Case(jnp.matmul, (array(64, 128), array(128, 32)), 2 * 64 * 128 * 32),
    "batched matmul": Case(
        lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b),
        (array(4, 3, 16, 8), array(4, 3, 32, 8)),
        2 * 4 * 3 * 16 * 32 * 8,
    ),
    # x @ a forward, hidden @ b forward; two matmuls for b's gradient, one for a's.
    "training step": Case(
        mlp_step,
        (MLP_PARAMS, array(16, 64)),
        2 * 16 * (2 * 64 * 128 + 3 * 128 * 32),
    ),
    "scan": Case(scan, (array(32, 32), array(16, 32)), 7 * 2 * 16 * 32 * 32),
    "convolution": Case(
        convolution,
        (array(2, 10, 10, 8), array(3, 3, 8, 16)),
        2 * (2 * 8 * 8 * 16) * (3 * 3 * 8),
    ),
    # Of 10 x 3 taps on each axis, the first and the last meet padding.
    "padded convolution": Case(
        padded_convolution,
        (array(2, 10, 10, 8), array(3, 3, 8, 16)),
        2 * 2 * 16 * 8 * (3 * 10 - 2) ** 2,
    ),
    "branch": Case(
        branch,
        (array(dtype=jnp.bool_), array(32, 32), array(16, 32)),
        2 * 16 * 32 * 32,
    ),
    "no matmul": Case(jnp.tanh, (array(128, 128),), 0),
}
