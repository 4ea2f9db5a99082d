"""Programs made of steps, for random ones to be put together.

A program is a list of steps over a pool of values. A step is an operation
`(name, i, j)` of two values, a matmul `(name, i)` with the weight, or a block
`(name, i, steps)`: a call, loop or branch around a smaller program. Everything is
well-conditioned, so a rounding stays one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxmp


def normed(x, center):
    x = x - jnp.mean(x, -1, keepdims=True) if center else x
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1)


def rows(x):
    """At least two dimensions, for what needs rows."""
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)


def halves(x, y):
    return jnp.concatenate([x[..., ::2], y[..., 1::2]], -1) if x.ndim else x + y


def mask(x):
    return (jnp.arange(x.size) % 3 == 0).reshape(x.shape)


def dropped(x):
    keep = jax.random.bernoulli(jax.random.key(x.size), 0.75, x.shape)
    return jnp.where(keep, x / 0.75, 0.0)


# `f(x, y)`, with y of x's shape.
OPERATIONS = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "gate": lambda x, y: x * jnp.tanh(y),
    "div": lambda x, y: x / (1 + y * y),
    "where": lambda x, y: jnp.where(mask(x), x, y),
    "maximum": jnp.maximum,
    "concatenate": halves,
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
    "layer_norm": lambda x, y: normed(rows(x), True),
    "rms_norm": lambda x, y: normed(rows(x), False),
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
    "integers": lambda x, y: x + (jnp.arange(x.size) * 3 % 5).reshape(x.shape) / 5,
    "dropout": lambda x, y: dropped(x),
    "stop_gradient": lambda x, y: x + lax.stop_gradient(x),
    "to_half_and_back": lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32),
    "float16_sum": lambda x, y: x.astype(jnp.float16).sum().astype(jnp.float32) / 32,
}


def fit(y, x):
    """A value in the shape of another."""
    if y.shape == x.shape:
        return y
    if y.size == x.size:
        return y.reshape(x.shape)
    return jnp.broadcast_to(jnp.mean(y), x.shape)


def matmul(w, x):
    """A product with as much of the weight as fits."""
    x = rows(x)
    return x @ jnp.tile(w, (-(-x.shape[-1] // 8), 1))[: x.shape[-1]]


def precise_matmul(w, x):
    x = rows(x)[:, :8]
    return jnp.dot(x, w[: x.shape[-1]], precision="highest")


MATMULS = {"matmul": matmul, "precise_matmul": precise_matmul}


# A block is `block(f, w, x, n)`, with `f(w, x, n)` the smaller program, n an integer.


def scanned(f, w, x, n):
    def body(carry, w):
        h, total = carry
        y = f(w, h, n)
        return (h + 0.5 * jnp.tanh(fit(y, h)), total + jnp.mean(y)), y

    ws = jnp.stack([w, w.T, -w])
    (h, total), ys = lax.scan(body, (x, 0.0), ws, reverse=True)
    return h + total / 3 + fit(ys, h) * 0.1


def carried(f, w, x, n):
    """The weight is a constant of the loop."""
    return lax.scan(lambda h, _: (fit(f(w, h, n), h), h), x, None, 3, unroll=2)[0]


def fori(f, w, x, n):
    return lax.fori_loop(0, 3, lambda i, h: fit(f(w, h, n), h) * 0.5 + i / 4, x)


def while_loop(f, w, x, n):
    w, x = lax.stop_gradient((w, x))
    done = lax.while_loop(
        lambda c: c[0] < n + 2, lambda c: (c[0] + 1, fit(f(w, c[1], n), c[1])), (n, x)
    )
    return done[1]


def branches(f, w, x, n):
    return lax.switch(n, [lambda x: x, lambda x: fit(f(w, x, n), x), jnp.zeros_like], x)


def cond(f, w, x, n):
    return lax.cond(n > 0, lambda w: fit(f(w, x, n), x), lambda w: x * w[0, 0], w)


def custom_vjp(f, w, x, n):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, dy: jax.vjp(f, *args)[1](dy))
    return g(w, x, n)


def custom_jvp(f, w, x, n):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g(w, x, n)


def vmap(f, w, x, n):
    xs = jnp.stack([x, x * 0.5, -x])
    return jax.vmap(f, (None, 0, None))(w, xs, n).sum(0) / 3


def inner_gradient(f, w, x, n):
    return x - 0.1 * jax.grad(lambda x: jnp.mean(f(w, x, n) ** 2))(x)


def under(transform):
    return lambda f, w, x, n: transform(f)(w, x, n)


BLOCKS = {
    "scan": scanned,
    "scan_constant": carried,
    "fori": fori,
    "while": while_loop,
    "switch": branches,
    "cond": cond,
    "custom_vjp": custom_vjp,
    "custom_jvp": custom_jvp,
    "vmap": vmap,
    "gradient": inner_gradient,
    "jit": under(jax.jit),
    "checkpoint": under(jax.checkpoint),
    "checkpoint_dots": under(
        functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "full_precision": under(jaxmp.full_precision),
    "autocast": under(jaxmp.autocast),
}


def run_program(steps: Any, w: jax.Array, x: jax.Array, n: Any) -> list[jax.Array]:
    """Runs a program.

    Args:
      steps: the program.
      w: the weight, float32 `(8, 8)`.
      x: the input, float32 of any shape.
      n: an integer, which branches depend on.

    Returns:
      The pool of values, the input first.
    """
    pool = [x]
    for step in steps:
        name, i = step[:2]
        x = pool[i % len(pool)]
        if name in OPERATIONS:
            y = OPERATIONS[name](x, fit(pool[step[2] % len(pool)], x))
        elif name in MATMULS:
            y = MATMULS[name](w, x)
        else:
            y = BLOCKS[name](last_of(step[2]), w, x, n)
        pool.append(y)
    return pool


def last_of(steps):
    return lambda w, x, n: run_program(steps, w, x, n)[-1]
