"""`StepReport`: what the compilers said about a step, as text, page and chart."""

import dataclasses
import importlib.util
import io
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.figures import new_figure
from jaxmp._views.numbers import GIB, MIB
from jaxmp._views.result import Result, plain
from jaxmp.report._rows import Row
from jaxmp.report._wire_table import WIRE_CAPTION, WIRE_COLUMNS, wire_cells

_COLUMNS = (
    "target",
    "policy",
    "arguments",
    "temp",
    "output",
    "peak",
    "saved",
    "fits",
    "GFLOP",
    "accessed",
    "matmuls",
    "converts",
    "ms at least*",
    "bound by",
    "half gains at most*",
)
_NOTE = (
    "* An estimate, not a measurement: for every operation the larger of matmul FLOPs "
    "over the chip's published peak and bytes over its bandwidth. What stays in a "
    "TPU's own memory is free, so compare policies on a target, not targets. Sizes in "
)
_BUFFER_COLUMNS = ("MiB", "count", "array", "made at", "name")
_COLORS = {"arguments": "#9aa5b1", "temp": "#2a6fba", "results": "#e0a030"}


@dataclasses.dataclass(frozen=True)
class StepReport(Result):
    """What the compilers said about a step: one row for each policy and target.

    Its page has a chart if Matplotlib is installed.

    Attributes:
      rows: target by target, the policies in the order in which they were given.
    """

    rows: tuple[Row, ...]

    def row(self, policy: str, target: str) -> Row:
        """The row of a policy and a target, as they were written.

        Raises:
          KeyError: if the report does not have it.
        """
        for row in self.rows:
            if (row.policy, row.target) == (policy, target):
                return row
        known = ", ".join(f"{row.policy} on {row.target}" for row in self.rows)
        raise KeyError(
            f"The report has no row for {policy} on {target}. Its rows: {known}."
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain numbers and strings."""
        return [_as_dict(row) for row in self.rows]

    def to_png(self, path: Any) -> None:
        """Writes a bar chart of memory and of the estimated time.

        Args:
          path: file to write.

        Raises:
          MissingPackage: if Matplotlib is not installed.
        """
        Path(path).write_bytes(_bar_chart(self.rows))

    def __str__(self) -> str:
        parts = [_table.text_table(_COLUMNS, _cells(self.rows)), "", _note(self.rows)]
        for row in self.rows:
            parts += ["", f"{row.policy} on {row.target}: {_verdict(row)}"]
            if row.buffers:
                parts += ["", _indented(_BUFFER_COLUMNS, _buffer_cells(row))]
            if cells := wire_cells(row):
                parts += ["", WIRE_CAPTION, "", _indented(WIRE_COLUMNS, cells)]
            parts += [f"\n{finding.paragraph}" for finding in row.findings]
        return "\n".join(parts)

    def _page(self) -> str:
        styles = ["bad" if row.fits is False else "good" for row in self.rows]
        parts = [
            _html.table(_COLUMNS, _cells(self.rows), styles=styles),
            _html.paragraph(_note(self.rows)),
        ]
        if importlib.util.find_spec("matplotlib") is not None:
            chart = _bar_chart(self.rows)
            parts.insert(0, _html.image(chart, "memory and estimated time"))
        for row in self.rows:
            parts += [
                _html.heading(f"{row.policy} on {row.target}"),
                _html.paragraph(_verdict(row)),
            ]
            if row.buffers:
                cells, code = _buffer_cells(row), ("array", "made at", "name")
                parts.append(_html.table(_BUFFER_COLUMNS, cells, code=code))
            if cells := wire_cells(row):
                table = _html.table(WIRE_COLUMNS, cells, code=("most at",))
                parts += [_html.paragraph(WIRE_CAPTION), table]
            parts += [_html.preformatted(one.paragraph) for one in row.findings]
        return _html.page("A training step, as its compilers see it", *parts)


def _as_dict(row: Row) -> dict[str, Any]:
    data = plain(row)
    if row.roofline is not None:
        estimate = row.roofline
        data["roofline"]["bound"] = estimate.bound
        data["roofline"]["largest_gain"] = estimate.largest_gain
    return data


def _indented(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return textwrap.indent(_table.text_table(columns, cells), "  ")


def _note(rows: Iterable[Row]) -> str:
    return f"{_NOTE}{_unit(rows)[0]}."


def _unit(rows: Iterable[Row]) -> tuple[str, float]:
    """The unit in which to write the sizes of these rows: its name, and its bytes."""
    largest = max((row.peak or 0 for row in rows), default=0)
    return ("GiB", GIB) if largest >= GIB else ("MiB", MIB)


def _cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    first, (_, unit) = {}, _unit(rows)
    for row in rows:
        whole = first.setdefault(row.target, row.peak)
        saved = "" if not whole or row.peak is None else f"{1 - row.peak / whole:.0%}"
        time = row.roofline
        converts = row.contents and sum(x.times for x in row.contents.converts.values())
        yield [
            row.target,
            row.policy,
            *(_number(size, unit) for size in (row.arguments, row.temp, row.output)),
            _number(row.peak, unit),
            saved,
            {None: "?", True: "yes", False: "NO"}[row.fits],
            _number(row.flops, 1e9, 0),
            _number(row.accessed, unit),
            _shares(row),
            "-" if converts is None else str(converts),
            "-" if time is None else f"{1e3 * time.seconds:.3g}",
            "-" if time is None else time.bound,
            "-" if time is None else f"{time.largest_gain:.2f}x",
        ]


def _number(value: float | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _shares(row: Row) -> str:
    """The share of each dtype in the FLOPs of the matmuls."""
    if row.contents is None:
        return "-"
    flops = {dtype: total.amount for dtype, total in row.contents.matmuls.items()}
    whole = sum(flops.values()) or 1.0
    return ", ".join(f"{dtype} {x / whole:.0%}" for dtype, x in flops.items()) or "none"


def _verdict(row: Row) -> str:
    if row.message:
        return f"does not fit. {row.message}"
    name, unit = _unit([row])
    size = f"{(row.peak or 0) / unit:.2f} {name} at the peak"
    if row.memory is not None:
        verb = "fits" if row.fits else "does not fit"
        size += f", {verb} into {row.memory / GIB:.2f} GiB"
    if row.contents is None:
        return (
            f"{size}. Its compiler cannot write the program down: what it sends and "
            "what it holds is unknown."
        )
    if row.explained is None:
        return f"{size}."
    return f"{size}. The largest of the buffers that explain {row.explained:.0%} of it:"


def _buffer_cells(row: Row) -> list[list[str]]:
    here = f"{os.getcwd()}{os.sep}"
    return [
        [
            f"{buffer.bytes / MIB:.1f}",
            str(buffer.copies),
            buffer.array,
            buffer.source.removeprefix(here),
            buffer.name,
        ]
        for buffer in row.buffers
    ]


def _bar_chart(rows: Sequence[Row]) -> bytes:
    """Draws the rows whose memory is known; returns a PNG."""
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
    unit, unit_bytes = _unit(rows)
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
