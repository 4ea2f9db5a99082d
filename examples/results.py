"""The table and the plot that an example ends with."""

import argparse
import itertools
import math
import os
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import jaxmp
from jaxmp import report as compilers
from jaxmp.errors import JaxmpError

if TYPE_CHECKING:
    from runner import Experiment

HISTORY = ("loss", "loss_scale", "applied", "seconds")
History = dict[str, list[Any]]
"""What every step measured, by the names in `HISTORY`."""


class Run(NamedTuple):
    """What is left of training under one policy."""

    name: str
    policy: jaxmp.Policy
    history: History
    metrics: dict[str, Any]
    score: float
    half_score: float | None
    param_bytes: int


def report(experiment: "Experiment", runs: list[Run], args: argparse.Namespace) -> None:
    """Prints the table of all runs and draws them."""
    compiled = compiled_rows(experiment, args)
    memory = {name: row.peak or 0 for name, row in compiled.items()}
    print("\n" + table(experiment, runs, memory))
    if jax.default_backend() == "cpu":
        print("\nseconds per step: the CPU emulates half precision: not a speed claim.")
    if compiled and (appendix := experiment.appendix(compiled)):
        print("\n" + appendix)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "training.png"
    plot(experiment, runs, path)
    print(f"Plot: {path.resolve()}")


# The table


def table(experiment: "Experiment", runs: list[Run], memory: dict[str, int]) -> str:
    """Writes one line per policy, as a Markdown table."""
    reference = {run.policy: run.score for run in runs}.get(jaxmp.get_policy("float32"))
    show = "{:.2%}".format if experiment.score.endswith("accuracy") else "{:.4f}".format

    def columns(run: Run) -> Iterator[tuple[str, object]]:
        scales = [*run.history["loss_scale"], run.metrics["loss_scale"]]
        shown = map(show_scale, (scales[0], max(scales), scales[-1]))
        yield "policy", run.name
        yield experiment.score, show(run.score)
        if run.half_score is not None:
            yield f"{experiment.score}, all in half", show(run.half_score)
        if reference is not None:
            yield "difference to float32", f"{run.score / reference - 1:+.2%}"
        applied, skipped = run.metrics["applied_steps"], run.metrics["skipped_steps"]
        yield "applied / skipped steps", f"{applied} / {skipped}"
        yield "loss scale first, highest, last", ", ".join(shown)
        yield "bytes of params", f"{run.param_bytes:,}"
        if memory:
            each = " of each device" if ":" in experiment.target else ""
            label = f"step memory{each} on the H100's compiler"
            yield label, show_bytes(memory[run.name])
        yield "seconds per step", f"{statistics.median(run.history['seconds']):.3f}"

    rows = [list(map(str, dict(columns(run)).values())) for run in runs]
    return markdown([list(dict(columns(runs[0]))), *rows])


def markdown(rows: list[list[str]]) -> str:
    """Lays out a header and rows; all columns but the first are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        right = [cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *right])} |"

    return "\n".join(map(line, [rows[0], rule, *rows[1:]]))


def show_scale(scale: float) -> str:
    """Writes a power of two as `2^16`."""
    return "1" if scale == 1 else f"2^{math.log2(scale):.0f}"


def show_bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def compiled_rows(experiment: "Experiment", args: argparse.Namespace) -> dict[str, Any]:
    """What XLA's H100 compiler makes of one step per policy.

    Empty where the packages of the `targets` extra are not installed.
    """
    if not compilers.has_target("h100"):
        return {}
    print(f"\nCompiling the training step for {experiment.target} ...", flush=True)

    def step_of_policy(name: str) -> tuple[Any, ...]:
        if experiment.compiled_step is not None:
            return experiment.compiled_step(args.policies[name], args)
        training = experiment.prepare(args.policies[name], args)
        return training.train_step, training.state, training.batch(0)

    try:
        found = compilers.compile_step_of(
            step_of_policy,
            policies=list(args.policies),
            targets=[experiment.target],
            donate_argnums=[0],
        )
    except JaxmpError as error:
        print(f"It failed, so there is no column for it:\n{error}")
        return {}
    return {row.policy: row for row in found.rows}


# The plot


def plot(experiment: "Experiment", runs: list[Run], path: os.PathLike[str]) -> None:
    """Draws the losses, and every move of the loss scale with the steps it skipped."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, scales) = pyplot.subplots(
        2, sharex=True, figsize=(9, 6.5), height_ratios=(3, 2), layout="constrained"
    )
    # The curves lie on each other: each is thinner than the one below it.
    colors = ("#c9c9c9", "#d1495b", "#00798c", "#edae49")
    styles = itertools.cycle(zip(colors, (6, 3, 1.2, 0.7), strict=True))
    window = max(1, len(runs[0].history["loss"]) // 40)
    for run, (color, width) in zip(runs, styles, strict=False):
        label = f"{run.name}: {experiment.score} {run.score:.4g}"
        draw_loss(losses, run, window, color=color, linewidth=width, label=label)
        if run.metrics["loss_scale"] != 1:
            draw_scale(scales, run, color)
    losses.set(ylabel=f"training loss (mean of {window} steps)")
    losses.legend(frameon=False)
    scales.set(xlabel="step", ylabel="loss scale")
    scales.set_yscale("log", base=2)
    if scales.lines:
        scales.legend(frameon=False, loc="lower right")
    else:
        scales.text(0.5, 0.5, "the loss scale is 1", transform=scales.transAxes)
    for axes in (losses, scales):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_loss(axes: Any, run: Run, window: int, **style: Any) -> None:
    """Draws the mean of each `window` losses over the last step of it."""
    loss = np.convolve(run.history["loss"], np.ones(window) / window, "valid")
    axes.plot(np.arange(window, window + len(loss)), loss, **style)


def draw_scale(axes: Any, run: Run, color: str) -> None:
    """Draws the loss scale, and a cross for every skipped step."""
    scale = np.asarray(run.history["loss_scale"])
    skipped = np.flatnonzero(~np.asarray(run.history["applied"], bool))
    steps = np.arange(1, len(scale) + 1)
    axes.step(steps, scale, where="mid", color=color, label=run.name)
    axes.plot(
        steps[skipped],
        scale[skipped],
        "x",
        color="black",
        markersize=7,
        label=f"{len(skipped)} skipped steps",
    )
