"""Errors of recurrences under autocast, beside those of matmuls in half alone.

    python examples/benchmarks/autocast_recurrences.py

Recurrences of 2048 steps and width 8, as a `scan`. Each error is the largest, in units
of the largest value in float32: of the output, and of the gradient for the weights. "By
hand" is the same program in float32 whose matmuls read and return half: its sums are
float32, as autocast keeps them. The loss is scaled, as float16 needs it. Numerics only:
any machine will do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

import jaxmp

STEPS, SIZE = 2048, 8
SCALE = 2.0**10
KEYS = jax.random.split(jax.random.key(0), 4)
W = jax.random.normal(KEYS[0], (SIZE, SIZE)) / SIZE**0.5
Q, K, V = (jax.random.normal(key, (STEPS, SIZE)) for key in KEYS[1:])


def normalised_linear_attention(w, dot):
    def step(carry, x):
        state, total = carry
        q, k, v = x
        state, total = state + jnp.outer(k, v), total + k
        return (state, total), dot(q, state) / dot(q, total)

    q, k = jax.nn.softplus(dot(Q, w)), jax.nn.softplus(dot(K, w))
    return lax.scan(step, (jnp.zeros((SIZE, SIZE)), jnp.zeros(SIZE)), (q, k, V))[1]


def linear_attention(w, dot):
    def step(state, x):
        q, k, v = x
        state = state + jnp.outer(k, v)
        return state, dot(q, state)

    return lax.scan(step, jnp.zeros((SIZE, SIZE)), (dot(Q, w), dot(K, w), V / 32))[1]


def delta_rule(w, dot):
    def step(state, x):
        q, k, v = x
        state = state + 0.5 * jnp.outer(k, v - dot(k, state))
        return state, dot(q, state)

    k = dot(K, w)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return lax.scan(step, jnp.zeros((SIZE, SIZE)), (dot(Q, w), k, V))[1]


def leaky_integrator(w, dot):
    def step(h, x):
        h = 0.999 * h + 0.001 * x
        return h, dot(h, w)

    return lax.scan(step, jnp.zeros(SIZE), 1 + V)[1]


def selective_state_space(w, dot):
    def step(h, x):
        decay, x = x
        h = decay * h + (1 - decay) * x
        return h, dot(h, w)

    decay = jnp.exp(-0.01 * jax.nn.softplus(dot(K, w)))
    return lax.scan(step, jnp.zeros(SIZE), (decay, 1 + V))[1]


RECURRENCES = (
    normalised_linear_attention,
    linear_attention,
    delta_rule,
    leaky_integrator,
    selective_state_space,
)


def half_dot(dtype: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A product that reads and returns half, for a program in float32."""

    def dot(a, b):
        return (a.astype(dtype) @ b.astype(dtype)).astype(jnp.float32)

    return dot


def results(fn: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The output of a function of the weights, and a gradient."""

    def loss(w):
        y = fn(w)
        return SCALE * jnp.mean(y * y), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(W)
    return y, gradient / SCALE


def main() -> None:
    print("| recurrence | dtype | by hand: output, gradient | autocast |")
    print("|---|---|---|---|")
    for fn in RECURRENCES:
        plain = lambda w, fn=fn: fn(w, jnp.matmul)  # noqa: E731
        expected = results(plain)
        for dtype in ("bfloat16", "float16"):
            dot = half_dot(dtype)
            by_hand = results(lambda w, fn=fn, dot=dot: fn(w, dot))
            cast = results(jaxmp.autocast(plain, f"mixed_{dtype}"))
            cells = (
                ", ".join(
                    f"{jnp.abs(a - e).max() / jnp.abs(e).max():.4f}"
                    for a, e in zip(found, expected, strict=True)
                )
                for found in (by_hand, cast)
            )
            name = fn.__name__.replace("_", " ")
            print(f"| {name} | {dtype} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
