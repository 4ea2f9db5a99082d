"""Times a float16 training step under four loss scalers, side by side, on the CPU.

The same network on the same batch with the same optimizer (AdamW behind a clip by
global norm) is trained with Flax's `DynamicScale`, with jmp by hand, with mpx and with
jaxmp. Weights are large and the batch is small, so that much of the step is what the
four differ in: unscale, check, clip, update, skip. They take turns, one step each, and
every step is compared with the others of its round, so that a busy machine slows all
alike. The loss after the last step shows that all of them do the same work.

    pip install 'jaxmp[test]'
    python examples/benchmarks/update_step.py

The CPU emulates half precision: ratios of overhead, not a speed claim.
"""

import argparse
import os
import platform
import time
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import jmp
import mpx
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale

import jaxmp

# mpx holds its scale in float16, so that all four start at one that fits.
INIT_SCALE = 2.0**10
POLICY = jaxmp.get_policy("mixed_float16")
PACKAGES = ("jax", "flax", "optax", "jmp", "mixed-precision-for-jax", "jaxmp")


def half_loss(weights, x, y):
    """Multiplies in the dtype of its arguments and returns a float32 loss."""
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.mean(jnp.square((x - y).astype(jnp.float32)))


def loss_fn(weights, x, y):
    return half_loss(*POLICY.cast_to_compute((weights, x, y)))


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def flax_dynamic_scale(weights):
    tx = optimizer()

    def step(state, x, y):
        weights, opt_state, scale = state
        scale, finite, loss, grads = scale.value_and_grad(loss_fn)(weights, x, y)
        updates, new_opt_state = tx.update(grads, opt_state, weights)
        new_weights = optax.apply_updates(weights, updates)
        weights, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (new_weights, new_opt_state),
            (weights, opt_state),
        )
        return (weights, opt_state, scale), loss

    # As arrays: with its own Python numbers it compiles twice.
    scale = DynamicScale(scale=jnp.float32(INIT_SCALE), fin_steps=jnp.int32(0))
    return step, (weights, tx.init(weights), scale)


def jmp_by_hand(weights):
    tx = optimizer()

    def step(state, x, y):
        weights, opt_state, scale = state

        def scaled_loss_fn(weights):
            loss = loss_fn(weights, x, y)
            return scale.scale(loss), loss

        grads, loss = jax.grad(scaled_loss_fn, has_aux=True)(weights)
        grads = scale.unscale(grads)
        finite = jmp.all_finite(grads)
        updates, new_opt_state = tx.update(grads, opt_state, weights)
        new_weights = optax.apply_updates(weights, updates)
        weights, opt_state = jmp.select_tree(
            finite, (new_weights, new_opt_state), (weights, opt_state)
        )
        return (weights, opt_state, scale.adjust(finite)), loss

    scale = jmp.DynamicLossScale(jnp.float32(INIT_SCALE))
    return step, (weights, tx.init(weights), scale)


def mpx_functions(weights):
    tx = optimizer()

    def step(state, x, y):
        weights, opt_state, scale = state
        differentiated = mpx.filter_value_and_grad(half_loss, scale)
        loss, scale, finite, grads = differentiated(weights, x, y)
        weights, opt_state = mpx.optimizer_update(weights, tx, opt_state, grads, finite)
        return (weights, opt_state, scale), loss

    scale = mpx.DynamicLossScaling(jnp.float32(INIT_SCALE), jnp.float32(1))
    return step, (weights, tx.init(weights), scale)


def jaxmp_transformation(weights):
    tx = jaxmp.loss_scaling(optimizer(), POLICY, init_scale=INIT_SCALE)

    def step(state, x, y):
        weights, opt_state = state
        differentiated = jaxmp.value_and_grad(loss_fn)
        loss, grads = differentiated(weights, x, y, loss_scale=opt_state)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return (optax.apply_updates(weights, updates), opt_state), loss

    return step, (weights, tx.init(weights))


SCALERS = {
    "Flax DynamicScale": flax_dynamic_scale,
    "jmp by hand": jmp_by_hand,
    "mpx": mpx_functions,
    "jaxmp": jaxmp_transformation,
}


def measure(width: int, depth: int, batch: int, rounds: int):
    """Returns seconds of shape [scaler, round], and the last loss of each scaler."""
    x, y = jax.random.normal(jax.random.key(0), (2, batch, width))
    runs = []
    for scaler in SCALERS.values():
        weights = jax.random.normal(jax.random.key(1), (depth, width, width))
        step, state = scaler(list(weights / width**0.5))
        step = jax.jit(step, donate_argnums=0)
        state, _ = step(state, x, y)
        runs.append((step, state))
    seconds = np.zeros((len(runs), rounds))
    losses = [None] * len(runs)
    for i in range(rounds):
        for j, (step, state) in enumerate(runs):
            start = time.perf_counter()
            state, loss = jax.block_until_ready(step(state, x, y))
            seconds[j, i] = time.perf_counter() - start
            runs[j], losses[j] = (step, state), float(loss)
    return seconds, losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()

    seconds, losses = measure(args.width, args.depth, args.batch, args.rounds)
    fastest = seconds[np.argmin(np.median(seconds, axis=1))]
    ratios = seconds / fastest

    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    print(
        f"{args.depth} weights of {args.width} x {args.width}, batch {args.batch}, "
        f"{args.rounds} rounds, device {jax.devices()[0].platform}"
    )
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
