"""The table and the plot that an example ends with."""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxmp
from jaxmp import report as compilers
from jaxmp.report.compile.targets import TARGET_ENVIRONMENT

HISTORY = ("loss", "loss_scale", "applied", "seconds")


class Run(NamedTuple):
    """What is left of training under one policy."""

    name: str
    policy: jaxmp.Policy
    history: dict[str, list[Any]]
    metrics: dict[str, Any]
    score: float
    half_score: float | None
    param_bytes: int


def report(experiment: Any, runs: list[Run], args: argparse.Namespace):
    """Prints the table of all runs and draws them."""
    memory = h100_memory(experiment, args)
    print("\n" + table(experiment, runs, memory))
    if jax.default_backend() == "cpu":
        print("\nseconds per step: the CPU emulates half precision: not a speed claim.")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "training.png"
    plot(experiment, runs, path)
    print(f"Plot: {path.resolve()}")


def table(experiment: Any, runs: list[Run], memory: dict[str, int]) -> str:
    """Writes one line per policy, as a table that Markdown takes too."""
    reference = {run.policy: run.score for run in runs}.get(jaxmp.get_policy("float32"))
    show = "{:.2%}".format if experiment.score.endswith("accuracy") else "{:.4f}".format

    def columns(run):
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
            yield "step memory on the H100's compiler", show_bytes(memory[run.name])
        yield "seconds per step", f"{statistics.median(run.history['seconds']):.3f}"

    rows = [list(map(str, dict(columns(run)).values())) for run in runs]
    header = list(dict(columns(runs[0])))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    rule[0] = "-" * widths[0]

    def line(cells):
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in others)]
        return "| " + " | ".join(padded) + " |"

    return "\n".join(map(line, [header, rule, *rows]))


def show_scale(scale: float) -> str:
    """Writes a power of two as `2^16`."""
    return "1" if scale == 1 else f"2^{math.log2(scale):.0f}"


def show_bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def h100_memory(experiment: Any, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of one step per policy, as XLA's H100 compiler plans it.

    That compiler has to be loaded by a process of its own. Nothing is returned where
    the packages of the `targets` extra are not installed.
    """
    if not compilers.has_target("h100"):
        return {}
    print("\nCompiling the training step for an H100 ...", flush=True)
    policies = [f"--policy={name}" for name in args.policies]
    steps = [f"--steps={args.steps}", f"--growth-interval={args.growth_interval}"]
    child = subprocess.run(
        [sys.executable, experiment.script, "--h100-memory", *policies, *steps],
        env={**os.environ, **TARGET_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        print(f"It failed, so there is no column for it:\n{child.stderr[-1000:]}")
        return {}
    return json.loads(child.stdout.splitlines()[-1])


def compile_steps(experiment: Any, args: argparse.Namespace) -> dict[str, int]:
    """Compiles the step of every policy for an H100 and counts its bytes."""

    def step_bytes(policy):
        training = experiment.prepare(policy, args)
        memory = compilers.compile_for(
            "h100",
            training.train_step,
            training.state,
            training.batch(0),
            donate_argnums=0,
        ).memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )

    return {name: step_bytes(policy) for name, policy in args.policies.items()}


def plot(experiment: Any, runs: list[Run], path: os.PathLike[str]):
    """Draws the losses, and every move of the loss scale with the steps it skipped."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, scales) = pyplot.subplots(
        2, sharex=True, figsize=(9, 6.5), height_ratios=(3, 2), layout="constrained"
    )
    # The curves lie on each other: each is thinner than the one below it.
    styles = itertools.cycle([("#c9c9c9", 6), ("#d1495b", 3), ("#00798c", 1.2)])
    window = max(1, len(runs[0].history["loss"]) // 40)
    for run, (color, width) in zip(runs, styles, strict=False):
        loss = np.asarray(run.history["loss"])
        scale = np.asarray(run.history["loss_scale"])
        skipped = np.flatnonzero(~np.asarray(run.history["applied"], bool))
        steps = np.arange(1, len(loss) + 1)
        smooth = np.convolve(loss, np.ones(window) / window, "valid")
        losses.plot(
            steps[window - 1 :],
            smooth,
            color=color,
            linewidth=width,
            label=f"{run.name}: {experiment.score} {run.score:.4g}",
        )
        if run.metrics["loss_scale"] == 1:
            continue
        scales.step(steps, scale, where="mid", color=color, label=run.name)
        scales.plot(
            steps[skipped],
            scale[skipped],
            "x",
            color="black",
            markersize=7,
            label=f"{len(skipped)} skipped steps",
        )
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
