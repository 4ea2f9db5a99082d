"""Calls, loops and branches around the smaller programs in a random program.

A block is `block(f, w, x, n)`, with `f(w, x, n)` the smaller program, n an integer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxmp
from tests.support.programs.values import fit

Smaller = Callable[[jax.Array, jax.Array, Any], jax.Array]


def _scan(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    def body(carry, w):
        h, total = carry
        y = f(w, h, n)
        return (h + 0.5 * jnp.tanh(fit(y, h)), total + jnp.mean(y)), y

    ws = jnp.stack([w, w.T, -w])
    (h, total), ys = lax.scan(body, (x, 0.0), ws, reverse=True)
    return h + total / 3 + fit(ys, h) * 0.1


def _carried(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    """The weight is a constant of the loop."""
    return lax.scan(lambda h, _: (fit(f(w, h, n), h), h), x, None, 3, unroll=2)[0]


def _fori(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, h: fit(f(w, h, n), h) * 0.5 + i / 4, x)


def _while(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    w, x = lax.stop_gradient((w, x))
    done = lax.while_loop(
        lambda c: c[0] < n + 2, lambda c: (c[0] + 1, fit(f(w, c[1], n), c[1])), (n, x)
    )
    return done[1]


def _switch(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    return lax.switch(n, [lambda x: x, lambda x: fit(f(w, x, n), x), jnp.zeros_like], x)


def _cond(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    def scaled(w):
        return (x * w[0, 0]).astype(x.dtype)

    return lax.cond(n > 0, lambda w: fit(f(w, x, n), x), scaled, w)


def _custom_vjp(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, dy: jax.vjp(f, *args)[1](dy))
    return g(w, x, n)


def _custom_jvp(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g(w, x, n)


def _vmap(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    xs = jnp.stack([x, x * 0.5, -x])
    return jax.vmap(f, (None, 0, None))(w, xs, n).sum(0) / 3


def _gradient(f: Smaller, w: jax.Array, x: jax.Array, n: Any) -> jax.Array:
    return x - 0.1 * jax.grad(lambda x: jnp.mean(f(w, x, n) ** 2))(x)


def _under(transform: Callable[..., Any]) -> Callable[..., jax.Array]:
    return lambda f, w, x, n: transform(f)(w, x, n)


BLOCKS = {
    "scan": _scan,
    "scan_constant": _carried,
    "fori": _fori,
    "while": _while,
    "switch": _switch,
    "cond": _cond,
    "custom_vjp": _custom_vjp,
    "custom_jvp": _custom_jvp,
    "vmap": _vmap,
    "gradient": _gradient,
    "jit": _under(jax.jit),
    "checkpoint": _under(jax.checkpoint),
    "checkpoint_dots": _under(
        functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "full_precision": _under(jaxmp.full_precision),
    "autocast": _under(jaxmp.autocast),
}

DECIDED = frozenset(("full_precision", "autocast"))
"""The blocks that say themselves in which precision they are."""
