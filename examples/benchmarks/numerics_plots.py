"""Trains the language model of `train_lm.py` in float16 under a monitor and draws it.

    python examples/benchmarks/numerics_plots.py --folder docs

Three figures: the exponents of the gradients against the ranges of float16 and
bfloat16, what underflows in each layer at each measured step, and the loss scale. The
report of the last measured step is printed.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmp
from jaxmp.numerics import (
    get_statistics,
    monitor,
    monitor_report,
    plot_exponents,
    plot_loss_scale,
    plot_underflow,
)

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import train_lm

POLICY, EVERY, GROWTH_INTERVAL = "mixed_float16", 10, 20


def train(steps):
    """Returns the last state, the reports and the loss scale's metrics of a run."""
    text, _, vocabulary = train_lm.load_text(seed=0)
    model = jaxmp.apply_policy(train_lm.GPT(vocabulary), POLICY)
    example = jnp.zeros((1, train_lm.CONTEXT), jnp.int32)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(train_lm.LEARNING_RATE)
    )
    scaled = jaxmp.loss_scaling(optimizer, POLICY, growth_interval=GROWTH_INTERVAL)
    state = jaxmp.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), example)["params"],
        tx=monitor(scaled, every=EVERY),
        policy=POLICY,
    )
    step = jax.jit(train_lm.train_step, donate_argnums=0)
    generator = np.random.default_rng(0)
    reports, metrics = [], []
    for i in range(1, steps + 1):
        starts = generator.integers(len(text) - train_lm.CONTEXT, size=train_lm.BATCH)
        state, _ = step(state, train_lm.windows_at(text, starts))
        metrics.append(jax.tree.map(np.asarray, jaxmp.loss_scale_metrics(state)))
        if i % EVERY == 0:
            reports.append(monitor_report(state, loss_scale=1))
    return state, reports, metrics


def draw(folder, ending, state, reports, metrics):
    """Saves the three figures."""
    gradients = get_statistics(state).gradients
    scale = float(jaxmp.get_loss_scale(state))
    name = "numerics_{}.{}".format
    plot_exponents(gradients, loss_scale=scale, path=folder / name("exponents", ending))
    plot_underflow(reports, path=folder / name("underflow", ending))
    plot_loss_scale(metrics, path=folder / name("loss_scale", ending))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path())
    parser.add_argument("--ending", default="svg")
    args = parser.parse_args()
    state, reports, metrics = train(args.steps)
    draw(args.folder, args.ending, state, reports, metrics)
    print(monitor_report(state))


if __name__ == "__main__":
    main()
