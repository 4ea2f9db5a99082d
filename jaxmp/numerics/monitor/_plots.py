"""Plots of a training run: what was lost, and the loss scale. Needs Matplotlib."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmp._views.figures import KEPT, LOST, finished, legend_below, new_axes
from jaxmp.errors import NumericsError
from jaxmp.numerics.monitor._report import MonitorReport


def plot_underflow(
    history: Sequence[MonitorReport],
    *,
    quantity: str = "underflow",
    path: str | os.PathLike[str] | None = None,
    ax: Any = None,
) -> Any:
    """Draws a heat map, layer by step, of what was lost.

    Args:
      history: one `monitor_report` for each measured step.
      quantity: which share of the report's rows to draw: `"underflow"`,
        `"subnormal"`, `"overflow"`, `"zero"` or `"lost"`.
      path: where to save the figure; its ending chooses the format.
      ax: Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      MissingPackage: if Matplotlib is not installed.
      NumericsError: if nothing was measured, or for another `quantity`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxmp.numerics import monitor, monitor_report, plot_underflow
      >>> tx = monitor(optax.sgd(0.1), every=1)
      >>> params = {"w": jnp.ones(4), "b": jnp.ones(2)}
      >>> state, history = tx.init(params), []
      >>> for size in (1e-3, 1e-6, 1e-9):
      ...     grads = {"w": jnp.full(4, size), "b": jnp.ones(2)}
      ...     _, state = tx.update(grads, state, params)
      ...     history.append(monitor_report(state))
      >>> ax = plot_underflow(history)
    """
    measured = {report.step: report for report in history if report.step}
    if not measured or quantity not in _QUANTITIES:
        raise NumericsError(
            f"There is no {quantity!r} to draw in {len(measured)} measured steps. Pass "
            "the monitor_report(opt_state) of several measured steps, and a quantity "
            f"of {', '.join(map(repr, _QUANTITIES))}."
        )
    first = next(iter(measured.values()))
    names = [row.path for row in first.rows]
    shares = [
        [getattr(r, quantity) for r in report.rows] for report in measured.values()
    ]
    percent = 100 * np.array(shares).T
    ax = new_axes(ax, 8, 1.4 + 0.2 * len(names))
    image = ax.imshow(
        percent, aspect="auto", cmap="Reds", vmin=0, interpolation="nearest"
    )
    ticks = range(0, len(measured), math.ceil(len(measured) / 10))
    ax.set_xticks(ticks, [list(measured)[i] for i in ticks])
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.set(xlabel="step", title=_title(quantity, list(measured.values())))
    ax.title.set_fontsize("medium")
    ax.figure.colorbar(image, ax=ax, label="%")
    return finished(ax, path)


def _title(quantity: str, reports: Sequence[MonitorReport]) -> str:
    is_scaled = any(report.loss_scale != 1 for report in reports)
    scale = "under the loss scale" if is_scaled else "without a loss scale"
    return _QUANTITIES[quantity].format(dtype=f"{reports[0].dtype} {scale}")


_QUANTITIES = {
    "underflow": "gradients that become zero in {dtype}",
    "subnormal": "gradients that are subnormal in {dtype}",
    "overflow": "gradients that become infinite in {dtype}",
    "zero": "gradients that are zero",
    "lost": "updates that were lost to rounding",
}


def plot_loss_scale(
    history: Sequence[Mapping[str, Any]],
    *,
    path: str | os.PathLike[str] | None = None,
    ax: Any = None,
) -> Any:
    """Draws the loss scale over the steps, and marks the skipped ones.

    Args:
      history: the `loss_scale_metrics` of every step, in order.
      path: where to save the figure; its ending chooses the format.
      ax: Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      MissingPackage: if Matplotlib is not installed.
      NumericsError: if the history is empty.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.numerics import plot_loss_scale
      >>> tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")
      >>> state, history = tx.init(jnp.ones(())), []
      >>> for grad in (1.0, jnp.inf, 1.0):
      ...     _, state = tx.update(jnp.float32(grad), state, jnp.ones(()))
      ...     history.append(jaxmp.loss_scale_metrics(state))
      >>> ax = plot_loss_scale(history)
    """
    if not history:
        raise NumericsError(
            "The history is empty. Append jaxmp.loss_scale_metrics(opt_state) after "
            "each step, and pass the list."
        )
    scales = np.array([float(step["loss_scale"]) for step in history])
    skipped = np.array([not bool(step["grads_finite"]) for step in history])
    steps = np.arange(1, len(history) + 1)
    ax = new_axes(ax, 8, 3.2)
    ax.step(steps, scales, where="post", color=KEPT, label="loss scale after the step")
    label = f"skipped: {skipped.sum()} of {len(steps)} steps"
    ax.plot(steps[skipped], scales[skipped], "v", color=LOST, label=label, markersize=5)
    ax.set_yscale("log", base=2)
    ax.set_ylim(scales.min() / 2.5, scales.max() * 2.5)
    ax.set(xlabel="step", ylabel="loss scale")
    ax.grid(axis="y", alpha=0.3)
    legend_below(ax, columns=2)
    return finished(ax, path)
