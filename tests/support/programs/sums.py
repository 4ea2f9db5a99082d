"""Loops of random programs whose carry is a running sum, `a * old + increment`.

A matmul in the body reads the sum, and the smaller program goes on from what it
returns. An update is `update(h, x, read)`, with `x` a row of what entered the loop and
`read(h)` what the program makes of the sum; it returns the sum and what was read. The
increments of all steps together are of the size of one row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.programs.blocks import Smaller
from tests.support.programs.values import added, fit, rows, weight_for

SHORT, LONG = 8, 512
"""Steps: as few as layers, and so many that a sum in half would lose most of them."""

Update = Callable[..., tuple[jax.Array, jax.Array]]
Step = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _total(h: jax.Array, x: jax.Array, read: Any, steps: int) -> Any:
    h = added(h, (1 + x) / steps)
    return h, read(h)


def _decayed(h: jax.Array, x: jax.Array, read: Any, steps: int) -> Any:
    h = (1 - 1 / steps) * h + (1 + x) / steps
    return h, read(h)


def _gated(h: jax.Array, x: jax.Array, read: Any, steps: int) -> Any:
    a = jnp.exp(-(1 + jnp.tanh(x)) / steps)
    h = a * h + (1 - a) * (1 + x)
    return h, read(h)


def _fed_back(h: jax.Array, x: jax.Array, read: Any, steps: int) -> Any:
    """An integrator: the increment is a network of the sum."""
    y = read(h)
    return h + (1 + x + 0.5 * jnp.tanh(fit(y, h))) / steps, y


def _outer(h: jax.Array, x: jax.Array, read: Any, steps: int) -> Any:
    """Linear attention: the sum is a matrix."""
    k = (1 + jnp.tanh(x[:4])) / steps
    h = h + jnp.outer(k, 1 + x)
    return h, read(h)


def _delta(h: jax.Array, x: jax.Array, read: Any, steps: int) -> Any:
    """The delta rule: the increment is linear in the sum, through a matmul."""
    k = (1 + jnp.tanh(x[:4])) / 4
    h = h + jnp.outer(k, 1 + x - read.dot(k, h)) / (steps / 4)
    return h, read(h)


UPDATES = {
    "total": _total,
    "decayed": _decayed,
    "gated": _gated,
    "fed_back": _fed_back,
    "outer": _outer,
    "delta": _delta,
}
_MATRICES = (_outer, _delta)


def _scan(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    h, ys = lax.scan(step, h, xs)
    return fit(jnp.mean(ys, 0), h) + h


def _nested(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    xs = xs.reshape(2, -1, *xs.shape[1:])
    h, ys = lax.scan(lambda h, xs: lax.scan(step, h, xs), h, xs)
    return fit(jnp.mean(ys, (0, 1)), h) + h


def _fori(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    """What is read is added up as well, and no matmul reads that."""

    def body(i, state):
        h, total = state
        h, y = step(h, xs[i])
        return h, total + jnp.mean(y) / len(xs)

    h, total = lax.fori_loop(0, len(xs), body, (h, jnp.zeros(())))
    return h + total


def _while(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    """How often it runs is not known before."""

    def body(state):
        i, h, _ = state
        h, y = step(h, xs[i])
        return i + 1, h, fit(y, h).astype(h.dtype)

    _, h, last = lax.while_loop(lambda state: state[0] < len(xs), body, (n, h, h))
    return h + last


def _masked(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    """Steps that are padding change nothing."""

    def either(h, x):
        new, y = step(h, x)
        return jnp.where(jnp.sum(x) > 1e3, h, new), y

    return _scan(either, h, xs, n)


def _branched(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    def either(h, x):
        def skip(h, x):
            return h, jnp.zeros_like(h)

        def go(h, x):
            h, y = step(h, x)
            return h, fit(y, h).astype(h.dtype)

        return lax.cond(jnp.sum(x) > 1e3, skip, go, h, x)

    return _scan(either, h, xs, n)


def _in_calls(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    return _scan(jax.checkpoint(jax.jit(step)), h, xs, n)


def _batched(step: Step, h: jax.Array, xs: jax.Array, n: Any) -> jax.Array:
    xs = jnp.stack([xs, 0.5 * xs])
    return jnp.mean(jax.vmap(lambda xs: _scan(step, h, xs, n))(xs), 0)


LOOPS = {
    "scan": _scan,
    "nested": _nested,
    "fori": _fori,
    "while": _while,
    "masked": _masked,
    "branched": _branched,
    "in_calls": _in_calls,
    "batched": _batched,
}


class _Read:
    """What the body makes of the sum: a matmul, and the smaller program after it."""

    def __init__(self, f: Smaller, w: jax.Array, n: Any, half: Any):
        self.f, self.w, self.n, self.half = f, w, n, half

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        if self.half is not None:
            x, y = x.astype(self.half), y.astype(self.half)
        return x @ y

    def __call__(self, h: jax.Array) -> jax.Array:
        return self.f(self.w, self.dot(h, weight_for(self.w, h)), self.n)


def _sum(
    loop: Callable[..., jax.Array],
    update: Update,
    steps: int,
    f: Smaller,
    half: Any,
    w: jax.Array,
    x: jax.Array,
    n: Any,
) -> jax.Array:
    """The loop of a sum; see `run_program` for `half`."""
    if loop is _while:
        w, x = lax.stop_gradient((w, x))  # It has no gradient.
    x = rows(x)[:, :16].astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, max(0, 4 - x.shape[1]))))
    xs = jnp.tile(jnp.tanh(x), (-(-steps // len(x)), 1))[:steps]
    # A few layers: their residual stream is in half, by hand as under autocast.
    is_stream = update is _fed_back and steps == SHORT and loop is not _while
    dtype = half if is_stream and half is not None else jnp.float32
    shape = (4, x.shape[1]) if update in _MATRICES else x.shape[1]
    read = _Read(f, w, n, half)

    def step(h, x):
        new, y = update(h, x, read, steps)
        return new.astype(h.dtype), y

    return loop(step, jnp.zeros(shape, dtype), xs, n)


SUMS = {
    f"{loop}_{update}{name}": functools.partial(_sum, LOOPS[loop], UPDATES[update], n)
    for loop in LOOPS
    for update in UPDATES
    for name, n in (("", SHORT), ("_long", LONG))
}
"""Blocks `block(f, half, w, x, n)`."""
