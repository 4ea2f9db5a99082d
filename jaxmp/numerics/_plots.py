"""Plots of what `statistics` and `monitor` found. Needs Matplotlib, an extra."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmp._views.figures import new_figure
from jaxmp.errors import NumericsError
from jaxmp.numerics._formats import format_range
from jaxmp.numerics._statistics import EXPONENTS, Statistics
from jaxmp.numerics.monitor._report import MonitorReport

Path = str | os.PathLike[str]

_KEPT, _PALE, _LOST, _RANGE = "#4878a8", "#a9c4de", "#c43c2c", "#707070"
_INK = "#303030"


def plot_exponents(
    statistics: Mapping[str, Statistics] | Statistics,
    *,
    loss_scale: float = 1.0,
    dtypes: Sequence[Any] = ("float16", "bfloat16"),
    path: Path | None = None,
    ax: Any = None,
) -> Any:
    """Draws the histogram of exponents against the ranges of half-precision formats.

    Gradients are drawn as they are. A loss scale moves them to the right by its
    exponent; that is drawn as the range of the format moving to the left instead. The
    formats stand above the histogram, pale where they are subnormal. What the first of
    them loses under the scale is drawn in red.

    Args:
      statistics: what `statistics` returns, or one entry of it, such as
        `get_statistics(opt_state).gradients`. Several are added up.
      loss_scale: the scale that the formats are drawn under.
      dtypes: the formats.
      path: where to save the figure; its ending chooses the format.
      ax: Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      MissingPackage: if Matplotlib is not installed.
      NumericsError: if there are no numbers, or a dtype is no floating one.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018, figure 3
      (https://arxiv.org/abs/1710.03740).

    Example:
      >>> import jax, tempfile
      >>> from jaxmp.numerics import plot_exponents, statistics
      >>> grads = jax.random.normal(jax.random.key(0), (1000,)) * 1e-5
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ax = plot_exponents(
      ...         statistics(grads), loss_scale=2.0**15, path=f"{folder}/grads.svg"
      ...     )
    """
    if isinstance(statistics, Statistics):
        statistics = {"": statistics}
    total = _added_up(statistics)
    size, zeros = max(int(total.size), 1), int(total.zeros)
    shares = 100 * np.asarray(total.exponents) / size
    exponents = np.array(EXPONENTS)
    if not shares.any():
        raise NumericsError(
            f"There is nothing to draw: of {int(total.size)} numbers {zeros} are zero "
            "and the rest is not finite. Was a step measured already?"
        )
    formats = [_moved(dtype, scale) for dtype in dtypes for scale in (1.0, loss_scale)]
    formats = list(dict.fromkeys(formats))
    main = _moved(dtypes[0], loss_scale)
    ax = _axes(ax, figsize=(8, 5))

    is_lost = (exponents < main.zero) | (exponents >= main.overflow)
    is_pale = ~is_lost & (exponents < main.normal)
    for mask, color, words in (
        (~is_lost & ~is_pale, _KEPT, "normal"),
        (is_pale, _PALE, "subnormal"),
        (is_lost, _LOST, "becomes zero or infinite"),
    ):
        label = f"{words} in {main.label}: {shares[mask].sum():.3g} %"
        heights = shares[mask]
        ax.bar(exponents[mask], heights, 0.9, align="edge", color=color, label=label)

    used = exponents[shares > 0]
    narrow = [f for f in formats if not f.has_range_of_float32]
    low = min([used.min(), *(f.zero for f in narrow)]) - 4
    high = max([used.max() + 1, *(f.overflow for f in narrow)]) + 4
    smallest, largest = math.log10(shares[shares > 0].min()), math.log10(shares.max())
    bottom = smallest - 0.3
    room = 0.95 - 0.1 * len(formats)
    ax.set_yscale("log")
    ax.set_ylim(10**bottom, 10 ** (bottom + (largest - bottom) / room))
    ax.set_yticks([10.0**k for k in range(math.ceil(bottom), 3)])
    ax.minorticks_off()
    ax.set_xlim(low, high)
    for i, format_ in enumerate(formats):
        _draw_format(ax, format_, y=0.91 - 0.1 * i)
    ax.set(
        xlabel="exponent e of the numbers, $2^e \\leq |x| < 2^{e+1}$",
        ylabel=f"% of {size:,} numbers",
        title=f"{100 * zeros / size:.3g} % are zero, and not drawn",
    )
    ax.title.set_fontsize("medium")
    _legend_below(ax, columns=1)
    return _finished(ax, path)


def plot_underflow(
    history: Sequence[MonitorReport],
    *,
    quantity: str = "underflow",
    path: Path | None = None,
    ax: Any = None,
) -> Any:
    """Draws a heat map, layer by step, of what was lost.

    Args:
      history: one `monitor_report` for each measured step.
      quantity: which share to draw: `"underflow"`, `"subnormal"`, `"overflow"`,
        `"zero"` or `"lost"`, as `LeafReport` has them.
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
    ax = _axes(ax, figsize=(8, 1.4 + 0.2 * len(names)))
    image = ax.imshow(
        percent, aspect="auto", cmap="Reds", vmin=0, interpolation="nearest"
    )
    ticks = range(0, len(measured), math.ceil(len(measured) / 10))
    ax.set_xticks(ticks, [list(measured)[i] for i in ticks])
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.set(xlabel="step", title=_title(quantity, list(measured.values())))
    ax.title.set_fontsize("medium")
    ax.figure.colorbar(image, ax=ax, label="%")
    return _finished(ax, path)


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
    path: Path | None = None,
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
    ax = _axes(ax, figsize=(8, 3.2))
    ax.step(steps, scales, where="post", color=_KEPT, label="loss scale after the step")
    label = f"skipped: {skipped.sum()} of {len(steps)} steps"
    ax.plot(
        steps[skipped], scales[skipped], "v", color=_LOST, label=label, markersize=5
    )
    ax.set_yscale("log", base=2)
    ax.set_ylim(scales.min() / 2.5, scales.max() * 2.5)
    ax.set(xlabel="step", ylabel="loss scale")
    ax.grid(axis="y", alpha=0.3)
    _legend_below(ax, columns=2)
    return _finished(ax, path)


# Formats above a histogram


class _Format(NamedTuple):
    """Exponents between which numbers are kept by a format, under a loss scale."""

    label: str
    has_range_of_float32: bool
    zero: float
    normal: float
    overflow: float


def _moved(dtype: Any, loss_scale: float) -> _Format:
    info = format_range(dtype)
    shift = 0.0 if info.has_range_of_float32 else math.log2(loss_scale)
    scaled = f" under the loss scale $2^{{{shift:g}}}$" if shift else ""
    return _Format(
        label=info.name + scaled,
        has_range_of_float32=info.has_range_of_float32,
        zero=math.log2(info.smallest_subnormal) - shift,
        normal=math.log2(info.smallest_normal) - shift,
        overflow=math.ceil(math.log2(info.largest)) - shift,
    )


def _draw_format(ax: Any, format_: _Format, y: float) -> None:
    """A bar over the exponents of a format, at a height from 0 to 1 of the axes."""
    height, above = 0.07, ax.get_xaxis_transform()
    for start, end, alpha in (
        (format_.zero, format_.normal, 0.2),
        (format_.normal, format_.overflow, 0.45),
    ):
        ax.barh(
            y,
            end - start,
            height,
            start,
            align="edge",
            color=_RANGE,
            alpha=alpha,
            transform=above,
        )
    middle = (
        max(format_.zero, ax.get_xlim()[0]) + min(format_.overflow, ax.get_xlim()[1])
    ) / 2
    ax.text(
        middle,
        y + height / 2,
        format_.label,
        transform=above,
        ha="center",
        va="center",
        fontsize="small",
        color=_INK,
    )


# Figures


def _added_up(statistics: Mapping[str, Statistics]) -> Statistics:
    several = list(statistics.values())
    if not several:
        raise NumericsError("There are no statistics to draw: the dictionary is empty.")
    return Statistics(
        *(np.sum([np.asarray(x) for x in f], 0) for f in zip(*several, strict=True))
    )


def _axes(ax: Any, figsize: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    ax = new_figure(*figsize).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _legend_below(ax: Any, columns: int) -> None:
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def _finished(ax: Any, path: Path | None) -> Any:
    if path is not None:
        ax.figure.savefig(path)
    return ax
