"""The chart of a step report: memory at the peak and estimated time, as bars."""

import io
from collections.abc import Sequence
from typing import Any

from jaxmp._views.figures import new_figure
from jaxmp._views.numbers import unit_of
from jaxmp.report._rows import Row

_COLORS = {"arguments": "#9aa5b1", "temp": "#2a6fba", "results": "#e0a030"}


def bar_chart(rows: Sequence[Row]) -> bytes:
    """Draws a bar for each row whose memory is known; returns a PNG.

    Raises:
      MissingPackage: if Matplotlib is not installed.
    """
    shown = [row for row in rows if row.peak is not None]
    figure = new_figure(11, 0.9 + 0.5 * max(len(shown), 2))
    memory, time = figure.subplots(1, 2)
    _draw_memory(memory, shown)
    _draw_time(time, shown)
    for axes in (memory, time):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw_memory(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))[::-1]
    unit, unit_bytes = unit_of(max((row.peak or 0 for row in rows), default=0))
    left = [0.0] * len(rows)
    for kind, color in _COLORS.items():
        sizes = [_bytes(row, kind) / unit_bytes for row in rows]
        axes.barh(places, sizes, left=left, label=kind, color=color)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, row, end in zip(places, rows, left, strict=True):
        axes.text(end, place, f" {(row.peak or 0) / unit_bytes:.2f}", va="center")
    axes.set_yticks(places, [f"{row.policy}\n{row.target}" for row in rows])
    axes.set_xlabel(f"{unit} at the peak")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def _draw_time(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))[::-1]
    times = [1e3 * row.roofline.seconds if row.roofline else 0.0 for row in rows]
    axes.barh(places, times, color="#2a8a3e")
    for place, time in zip(places, times, strict=True):
        axes.text(time, place, f" {time:.3g}", va="center")
    axes.set_yticks(places, [""] * len(rows))
    axes.set_xlabel("ms per step at least (roofline estimate, not a measurement)")


def _bytes(row: Row, kind: str) -> int:
    """Bytes of a part of the peak, without results that reuse an argument."""
    if kind == "results":
        return (row.peak or 0) - (row.arguments or 0) - (row.temp or 0)
    return getattr(row, kind) or 0
