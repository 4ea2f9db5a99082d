"""Errors of recurrences under autocast, and with only the matmuls in half by hand.

    python examples/benchmarks/autocast_recurrences.py

Recurrences of 2048 steps and width 8, as a `scan`. Errors are the largest of the output
and of the gradient for the weights, divided by the largest float32 value. "By hand" is
the same program in float32 whose matmuls read and return half: its sums are float32, as
autocast keeps them. The loss is scaled, as float16 needs it. Any machine will do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxmp

STEPS, SIZE = 2048, 8
SCALE = 2.0**10
KEYS = jax.random.split(jax.random.key(0), 4)
W = jax.random.normal(KEYS[0], (SIZE, SIZE)) / SIZE**0.5
Q, K, V = (jax.random.normal(key, (STEPS, SIZE)) for key in KEYS[1:])

Dot = Callable[[jax.Array, jax.Array], jax.Array]
"""Multiplies in float32, or in half."""
Recurrence = Callable[[jax.Array, Dot], jax.Array]
"""Takes weights; returns the outputs of all steps."""


def normalised_linear_attention(w: jax.Array, dot: Dot) -> jax.Array:
    def step(carry: Any, x: Any) -> tuple[Any, jax.Array]:
        state, total = carry
        q, k, v = x
        state, total = state + jnp.outer(k, v), total + k
        return (state, total), dot(q, state) / dot(q, total)

    q, k = jax.nn.softplus(dot(Q, w)), jax.nn.softplus(dot(K, w))
    return lax.scan(step, (jnp.zeros((SIZE, SIZE)), jnp.zeros(SIZE)), (q, k, V))[1]


def linear_attention(w: jax.Array, dot: Dot) -> jax.Array:
    def step(state: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v = x
        state = state + jnp.outer(k, v)
        return state, dot(q, state)

    return lax.scan(step, jnp.zeros((SIZE, SIZE)), (dot(Q, w), dot(K, w), V / 32))[1]


def delta_rule(w: jax.Array, dot: Dot) -> jax.Array:
    def step(state: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v = x
        state = state + 0.5 * jnp.outer(k, v - dot(k, state))
        return state, dot(q, state)

    k = dot(K, w)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return lax.scan(step, jnp.zeros((SIZE, SIZE)), (dot(Q, w), k, V))[1]


def leaky_integrator(w: jax.Array, dot: Dot) -> jax.Array:
    def step(h: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        h = 0.999 * h + 0.001 * x
        return h, dot(h, w)

    return lax.scan(step, jnp.zeros(SIZE), 1 + V)[1]


def selective_state_space(w: jax.Array, dot: Dot) -> jax.Array:
    def step(h: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        decay, x = x
        h = decay * h + (1 - decay) * x
        return h, dot(h, w)

    decay = jnp.exp(-0.01 * jax.nn.softplus(dot(K, w)))
    return lax.scan(step, jnp.zeros(SIZE), (decay, 1 + V))[1]


RECURRENCES: tuple[Recurrence, ...] = (
    normalised_linear_attention,
    linear_attention,
    delta_rule,
    leaky_integrator,
    selective_state_space,
)


def with_dot(fn: Recurrence, dot: Dot) -> Callable[[jax.Array], jax.Array]:
    return lambda w: fn(w, dot)


def half_dot(dtype: str) -> Dot:
    """A product that reads and returns half, for a program in float32."""

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.astype(dtype) @ b.astype(dtype)).astype(jnp.float32)

    return dot


def results(fn: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The output of a function of the weights, and the gradient of a loss."""

    def loss(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = fn(w)
        return SCALE * jnp.mean(y * y), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(W)
    return y, gradient / SCALE


def errors(
    found: tuple[jax.Array, jax.Array], expected: tuple[jax.Array, jax.Array]
) -> str:
    """The largest errors of an output and a gradient, relative to the largest value."""
    return ", ".join(
        f"{jnp.abs(a - e).max() / jnp.abs(e).max():.4f}"
        for a, e in zip(found, expected, strict=True)
    )


def main() -> None:
    print("| recurrence | dtype | by hand: output, gradient | autocast |")
    print("|---|---|---|---|")
    for fn in RECURRENCES:
        in_float32 = with_dot(fn, jnp.matmul)
        expected = results(in_float32)
        for dtype in ("bfloat16", "float16"):
            by_hand = results(with_dot(fn, half_dot(dtype)))
            cast = results(jaxmp.autocast(in_float32, f"mixed_{dtype}"))
            name = fn.__name__.replace("_", " ")
            cells = name, dtype, errors(by_hand, expected), errors(cast, expected)
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
