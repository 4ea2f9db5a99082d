"""Times a float16 training step under four loss scalers, side by side, on the CPU.

The same network on the same batch with the same optimizer (AdamW behind a clip by
global norm) is trained with Flax's `DynamicScale`, with jmp by hand, with mpx and with
jaxmp. Weights are large and the batch is small, so that much of the step is what the
four do differently: unscale, check, clip, update, skip. They take turns, one step each,
and every step is compared with the others of its round, so that a busy machine slows
all alike. Equal losses after the last step show that all do the same work.

    pip install 'jaxmp[test]'
    python examples/benchmarks/update_step.py

The CPU emulates half precision: ratios of overhead, not a speed claim.
"""

import argparse
import functools
import platform
import time
from importlib.metadata import version
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import ways
from models import Job

# mpx holds its scale in float16, so that all four start at one that fits.
INIT_SCALE = 2.0**10
PACKAGES = ("jax", "flax", "optax", "jmp", "mixed-precision-for-jax", "jaxmp")


class Mlp(nn.Module):
    """Square weights and tanh, nothing else."""

    depth: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.depth):
            x = jnp.tanh(nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype)(x))
        return x


def make_job(width: int, depth: int, batch: int) -> Job:
    """Large weights and a small batch, so that the update is much of the step."""

    def make_batch(key: jax.Array) -> tuple[tuple[jax.Array], jax.Array]:
        x, y = jax.random.normal(key, (2, batch, width))
        # Labels that float16 holds: mpx casts them too.
        return (x,), y.astype(jnp.float16).astype(jnp.float32)

    def loss(outputs: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(outputs.astype(jnp.float32) - y))

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    shape = f"{depth} weights of {width} x {width}, batch {batch}"
    return Job(functools.partial(Mlp, depth), make_batch, loss, optimizer, shape)


SCALERS = {
    "Flax DynamicScale": functools.partial(ways.by_hand, dtype=jnp.float16),
    "jmp by hand": functools.partial(ways.with_jmp, dtype=jnp.float16),
    "mpx": ways.with_mpx,
    "jaxmp": functools.partial(ways.with_jaxmp, dtype=jnp.float16, autocast=False),
}


def measure(job: Job, rounds: int) -> tuple[np.ndarray, list[float]]:
    """Returns seconds of shape [scaler, round], and the last loss of each scaler."""
    data = job.batch(jax.random.key(0))
    runs = []
    for scaler in SCALERS.values():
        training = scaler(job, init_scale=INIT_SCALE)
        step = jax.jit(training.step, donate_argnums=0)
        state, _ = step(jax.jit(training.init)(jax.random.key(1)), data)
        runs.append((step, state))
    seconds = np.zeros((len(runs), rounds))
    losses = [0.0] * len(runs)
    for i in range(rounds):
        for j, (step, state) in enumerate(runs):
            start = time.perf_counter()
            state, loss = jax.block_until_ready(step(state, data))
            seconds[j, i] = time.perf_counter() - start
            runs[j], losses[j] = (step, state), float(loss)
    return seconds, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    job = make_job(args.width, args.depth, args.batch)
    seconds, losses = measure(job, args.rounds)
    fastest = seconds[np.argmin(np.median(seconds, axis=1))]
    ratios = seconds / fastest

    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    print(f"{job.shape}, {args.rounds} rounds, device {jax.devices()[0].platform}")
    print("The CPU emulates half precision: ratios of overhead, not a speed claim.\n")
    print("scaler            | ms (median) | ratio to fastest (quartiles) | last loss")
    for name, row, ratio, loss in zip(SCALERS, seconds, ratios, losses, strict=True):
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        print(
            f"{name:17} | {1e3 * np.median(row):11.2f} | "
            f"{middle:14.3f} ({low:.3f} .. {high:.3f}) | {loss:.6f}"
        )


if __name__ == "__main__":
    main()
