"""Trains the language model of `train_lm.py` in float16 under a monitor and draws it.

    python examples/benchmarks/numerics_plots.py --folder docs

Three figures: the exponents of the gradients against the ranges of float16 and
bfloat16, what underflows in each layer at each measured step, and the loss scale. The
report of the last measured step is printed.
"""

import argparse
import pathlib
from typing import Any

import jax
import language_model
import numpy as np
from language_model import train_lm

import jaxmp
from jaxmp.numerics import (
    get_statistics,
    monitor,
    monitor_report,
    plot_exponents,
    plot_loss_scale,
    plot_underflow,
)

EVERY, GROWTH_INTERVAL = 10, 20


def train(steps: int) -> tuple[jaxmp.TrainState, list[Any], list[Any]]:
    """Returns the last state, the reports and the loss scale's metrics of a run."""
    state, text = language_model.make_state(
        lambda tx: monitor(tx, every=EVERY), growth_interval=GROWTH_INTERVAL
    )
    step = jax.jit(train_lm.train_step, donate_argnums=0)
    reports, metrics = [], []
    for i, batch in enumerate(language_model.batches(text, steps), 1):
        state, _ = step(state, batch)
        metrics.append(jax.tree.map(np.asarray, jaxmp.loss_scale_metrics(state)))
        if i % EVERY == 0:
            reports.append(monitor_report(state, loss_scale=1))
    return state, reports, metrics


def draw(
    folder: pathlib.Path,
    ending: str,
    state: jaxmp.TrainState,
    reports: list[Any],
    metrics: list[Any],
) -> None:
    """Saves the three figures."""

    def path(name: str) -> pathlib.Path:
        return folder / f"numerics_{name}.{ending}"

    gradients = get_statistics(state).gradients
    scale = float(jaxmp.get_loss_scale(state))
    plot_exponents(gradients, loss_scale=scale, path=path("exponents"))
    plot_underflow(reports, path=path("underflow"))
    plot_loss_scale(metrics, path=path("loss_scale"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path())
    parser.add_argument("--ending", default="svg")
    args = parser.parse_args()
    state, reports, metrics = train(args.steps)
    draw(args.folder, args.ending, state, reports, metrics)
    print(monitor_report(state))


if __name__ == "__main__":
    main()
