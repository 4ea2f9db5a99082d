"""`plot_exponents`: numbers against the ranges of formats. Needs Matplotlib."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxmp._views.figures import (
    GREY,
    KEPT,
    LOST,
    PALE,
    finished,
    legend_below,
    new_axes,
)
from jaxmp.errors import NumericsError
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.ranges._statistics import EXPONENTS, Statistics

_INK = "#303030"


def plot_exponents(
    statistics: Mapping[str, Statistics] | Statistics,
    *,
    loss_scale: float = 1.0,
    dtypes: Sequence[DTypeLike] = ("float16", "bfloat16"),
    path: str | os.PathLike[str] | None = None,
    ax: Any = None,
) -> Any:
    """Draws the histogram of exponents against the ranges of half-precision formats.

    A loss scale moves gradients to the right by its exponent. The plot keeps the
    gradients in place and shifts the formats' ranges to the left instead. They stand
    above the histogram, pale where numbers are subnormal. What the first format loses
    under the scale is red.

    Args:
      statistics: what `statistics` returns, or one entry of it, or
        `get_statistics(opt_state).gradients`. Several arrays are added up.
      loss_scale: the scale that shifts the formats.
      dtypes: the formats.
      path: where to save the figure; its ending chooses the format.
      ax: Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      MissingPackage: if Matplotlib is not installed.
      NumericsError: if there are no numbers, or a dtype is not a floating one.

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
    if not shares.any():
        raise NumericsError(
            f"There is nothing to draw: of {int(total.size)} numbers {zeros} are zero "
            "and the rest is not finite. Was a step measured already?"
        )
    formats = [_shifted(dtype, scale) for dtype in dtypes for scale in (1, loss_scale)]
    formats = list(dict.fromkeys(formats))
    ax = new_axes(ax, 8, 5)
    _draw_bars(ax, shares, _shifted(dtypes[0], loss_scale))
    _set_limits(ax, shares, formats)
    for i, format_ in enumerate(formats):
        _draw_format(ax, format_, y=0.91 - 0.1 * i)
    ax.set(
        xlabel="exponent e of the numbers, $2^e \\leq |x| < 2^{e+1}$",
        ylabel=f"% of {size:,} numbers",
        title=f"{100 * zeros / size:.3g} % are zero, and not drawn",
    )
    ax.title.set_fontsize("medium")
    legend_below(ax, columns=1)
    return finished(ax, path)


def _added_up(statistics: Mapping[str, Statistics]) -> Statistics:
    several = list(statistics.values())
    if not several:
        raise NumericsError("There are no statistics to draw: the dictionary is empty.")
    return Statistics(
        *(np.sum([np.asarray(x) for x in f], 0) for f in zip(*several, strict=True))
    )


class _Format(NamedTuple):
    """Exponents between which numbers are kept by a format, under a loss scale."""

    label: str
    has_range_of_float32: bool
    zero: float
    normal: float
    overflow: float


def _shifted(dtype: DTypeLike, loss_scale: float) -> _Format:
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


def _draw_bars(ax: Any, shares: np.ndarray, main: _Format) -> None:
    """The histogram, in the colours of what a format keeps and loses."""
    exponents = np.array(EXPONENTS)
    is_lost = (exponents < main.zero) | (exponents >= main.overflow)
    is_pale = ~is_lost & (exponents < main.normal)
    for mask, color, words in (
        (~is_lost & ~is_pale, KEPT, "normal"),
        (is_pale, PALE, "subnormal"),
        (is_lost, LOST, "becomes zero or infinite"),
    ):
        heights = shares[mask]
        label = f"{words} in {main.label}: {heights.sum():.3g} %"
        ax.bar(exponents[mask], heights, 0.9, align="edge", color=color, label=label)


def _set_limits(ax: Any, shares: np.ndarray, formats: Sequence[_Format]) -> None:
    """Leaves room for the formats above the bars."""
    used = np.array(EXPONENTS)[shares > 0]
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


def _draw_format(ax: Any, format_: _Format, y: float) -> None:
    """A bar over the exponents of a format, at a height from 0 to 1 of the axes."""
    height, above = 0.07, ax.get_xaxis_transform()
    zero, normal, overflow = format_.zero, format_.normal, format_.overflow
    for start, end, alpha in ((zero, normal, 0.2), (normal, overflow, 0.45)):
        style = {"align": "edge", "color": GREY, "alpha": alpha, "transform": above}
        ax.barh(y, end - start, height, start, **style)
    left, right = ax.get_xlim()
    middle = (max(zero, left) + min(overflow, right)) / 2
    style = {"ha": "center", "va": "center", "fontsize": "small", "color": _INK}
    ax.text(middle, y + height / 2, format_.label, transform=above, **style)
