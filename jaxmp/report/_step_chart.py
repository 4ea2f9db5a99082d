"""The chart of a step's rows: memory, and how much faster a policy should be."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmp._views.figures import new_figure
from jaxmp._views.numbers import GIB, MIB
from jaxmp.report._rows import Row

_COLORS = {"arguments": "#9aa5b1", "temp": "#2a6fba", "results": "#e0a030"}


def unit_of(rows: Iterable[Row]) -> tuple[str, float]:
    """The unit in which to write the sizes of these rows: its name, and its bytes."""
    largest = max((row.peak or 0 for row in rows), default=0)
    return ("GiB", GIB) if largest >= GIB else ("MiB", MIB)


def speed_ups(rows: Sequence[Row]) -> list[float | None]:
    """How many times as fast each row should be as the first of its target.

    Args:
      rows: in the order of a report.

    Returns:
      A ratio of estimates for each row; None where one of the two is unknown.
    """
    first: dict[str, Row] = {}
    found: list[float | None] = []
    for row in rows:
        whole = first.setdefault(row.target, row).roofline
        if whole is None or row.roofline is None or not row.roofline.cost:
            found.append(None)
        else:
            found.append(whole.cost / row.roofline.cost)
    return found


def bar_chart(rows: Sequence[Row]) -> bytes:
    """Draws the rows whose memory is known; returns a PNG."""
    shown = [row for row in rows if row.peak is not None]
    figure = new_figure(11, 0.9 + 0.5 * max(len(shown), 2))
    memory, speed = figure.subplots(1, 2)
    _draw_memory(memory, shown)
    _draw_speed_ups(speed, shown)
    for axes in (memory, speed):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw_memory(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))[::-1]
    unit, unit_bytes = unit_of(rows)
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


def _draw_speed_ups(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))[::-1]
    found = [x or 0.0 for x in speed_ups(rows)]
    axes.barh(places, found, color="#2a8a3e")
    for place, speed_up in zip(places, found, strict=True):
        axes.text(speed_up, place, f" {speed_up:.2f}x", va="center")
    axes.set_yticks(places, [""] * len(rows))
    axes.set_xlabel("times as fast as the first policy (an estimate)")


def _bytes(row: Row, kind: str) -> int:
    """Bytes of a part of the peak, without results that reuse an argument."""
    if kind == "results":
        return (row.peak or 0) - (row.arguments or 0) - (row.temp or 0)
    return getattr(row, kind) or 0
