"""Time to trace a function of up to 100,000 equations, with and without autocast.

    python examples/benchmarks/autocast_scaling.py --out docs/autocast_scaling.svg

The function repeats a norm, a matmul and tanh, of width 8. CPU times of tracing only;
nothing is compiled or run.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jaxmp


def network(w: jax.Array, x: jax.Array, *, blocks: int) -> jax.Array:
    """Blocks of a norm, a matmul and an activation."""
    for _ in range(blocks):
        mean = x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)
        x = x + jax.lax.tanh(((x - mean) * scale) @ w)
    return x.sum()


W, X = jnp.ones((8, 8)), jnp.ones((4, 8))


def trace(
    blocks: int, transform: Callable[[Callable], Callable] = lambda fn: fn
) -> tuple[float, int]:
    """Returns seconds to trace the transformed network, and its equations."""
    start = time.process_time()
    # A new function each time: JAX keeps the jaxprs of those that it knows.
    jaxpr = jax.make_jaxpr(transform(lambda w, x: network(w, x, blocks=blocks)))(W, X)
    return time.process_time() - start, len(jaxpr.eqns)


def seconds(equations: int, repeats: int = 3) -> tuple[int, float, float]:
    """Times tracing, the best of some.

    Args:
      equations: about how many the function has.
      repeats: how often each is timed.

    Returns:
      The number of equations, and seconds without and with autocast.
    """
    blocks = max(equations // trace(1)[1], 1)
    plain = [trace(blocks) for _ in range(repeats)]
    cast = [trace(blocks, jaxmp.autocast) for _ in range(repeats)]
    return plain[0][1], min(plain)[0], min(cast)[0]


def plot(rows: list[tuple[int, float, float]], path: str) -> None:
    """Draws the times over the number of equations, on logarithmic axes."""
    import matplotlib.pyplot as plt

    sizes, plain, cast = zip(*rows, strict=True)
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.loglog(sizes, plain, "o-", label="float32")
    axes.loglog(sizes, cast, "o-", label="autocast")
    axes.set(xlabel="equations", ylabel="seconds to trace")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Prints, and plots, one line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=100_000)
    parser.add_argument("--out", help="where to draw the plot")
    arguments = parser.parse_args()
    sizes = (1_000, 3_000, 10_000, 30_000, 100_000)
    print("equations  float32 s  autocast s  autocast us/equation")
    rows = []
    for size in sizes:
        if size <= arguments.largest:
            rows.append(seconds(size, repeats=3 if size < 30_000 else 1))
            count, plain, cast = rows[-1]
            print(
                f"{count:9,}  {plain:9.2f}  {cast:10.2f}  {cast / count * 1e6:20.0f}",
                flush=True,
            )
    if arguments.out:
        plot(rows, arguments.out)


if __name__ == "__main__":
    main()
