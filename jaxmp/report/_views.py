"""A report of a step as text, as a page and as a chart."""

import io
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.figures import new_figure

if TYPE_CHECKING:
    from jaxmp.report._step import Row

GIB = 2.0**30
MIB = 2.0**20

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


def report_text(rows: Sequence["Row"]) -> str:
    """Writes a report for a terminal."""
    note = _NOTE + _unit(rows).name + "."
    parts = [_table.text_table(_COLUMNS, _cells(rows)), "", note]
    for row in rows:
        parts += ["", f"{row.policy} on {row.target}: {_verdict(row)}"]
        if row.buffers:
            told = _table.text_table(_BUFFER_COLUMNS, _buffer_cells(row))
            parts += ["", *(f"  {line}" for line in told.splitlines())]
        parts += [f"  {line}" for line in _collectives(row)]
    return "\n".join(parts)


def report_page(rows: Sequence["Row"], chart: bytes | None) -> str:
    """Writes a report as one self-contained page."""
    styles = ["bad" if row.fits is False else "good" for row in rows]
    parts = [
        _html.table(_COLUMNS, _cells(rows), styles=styles),
        _html.paragraph(_NOTE + _unit(rows).name + "."),
    ]
    if chart is not None:
        parts.insert(0, _html.image(chart, "memory and estimated time"))
    for row in rows:
        parts += [
            _html.heading(f"{row.policy} on {row.target}"),
            _html.paragraph(_verdict(row)),
        ]
        if row.buffers:
            cells = list(_buffer_cells(row))
            code = ("array", "made at", "name")
            parts.append(_html.table(_BUFFER_COLUMNS, cells, code=code))
        parts += [_html.paragraph(line) for line in _collectives(row)]
    return _html.page("A training step, as its compilers see it", *parts)


class _Unit(NamedTuple):
    name: str
    bytes: float


def _unit(rows: Iterable["Row"]) -> _Unit:
    largest = max((row.peak or 0 for row in rows), default=0)
    return _Unit("GiB", GIB) if largest >= GIB else _Unit("MiB", MIB)


def bar_chart(rows: Sequence["Row"]) -> bytes:
    """Draws memory and estimated time as bars; returns a PNG."""
    shown = [row for row in rows if row.peak is not None]
    unit = _unit(shown)
    labels = [f"{row.policy}\n{row.target}" for row in shown]
    figure = new_figure(11, 0.9 + 0.5 * max(len(shown), 2))
    axes = figure.subplots(1, 2)
    places = range(len(shown))[::-1]
    left = [0.0] * len(shown)
    for kind, color in _PARTS.items():
        sizes = [_part(row, kind) / unit.bytes for row in shown]
        axes[0].barh(places, sizes, left=left, label=kind, color=color)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, row, end in zip(places, shown, left, strict=True):
        size = (row.peak or 0) / unit.bytes
        axes[0].text(end, place, f" {size:.2f}", va="center")
    axes[0].set_yticks(places, labels)
    axes[0].set_xlabel(f"{unit.name} at the peak")
    axes[0].legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False
    )
    times = [1e3 * row.roofline.seconds if row.roofline else 0.0 for row in shown]
    axes[1].barh(places, times, color="#2a8a3e")
    for place, time in zip(places, times, strict=True):
        axes[1].text(time, place, f" {time:.3g}", va="center")
    axes[1].set_yticks(places, [""] * len(shown))
    axes[1].set_xlabel("ms per step at least (roofline estimate, not a measurement)")
    for axis in axes:
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


_PARTS = {"arguments": "#9aa5b1", "temp": "#2a6fba", "results": "#e0a030"}


def _part(row: "Row", kind: str) -> int:
    """Bytes of a part of the peak; results that reuse an argument are none."""
    if kind == "results":
        return (row.peak or 0) - (row.arguments or 0) - (row.temp or 0)
    return getattr(row, kind) or 0


def _cells(rows: Sequence["Row"]) -> Iterable[list[str]]:
    first, unit = {}, _unit(rows).bytes
    for row in rows:
        whole = first.setdefault(row.target, row.peak)
        saved = "" if not whole or row.peak is None else f"{1 - row.peak / whole:.0%}"
        time = row.roofline
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
            str(sum(x.times for x in row.contents.converts.values()))
            if row.contents
            else "-",
            "-" if time is None else f"{1e3 * time.seconds:.3g}",
            "-" if time is None else time.bound,
            "-" if time is None else f"{time.largest_gain:.2f}x",
        ]


def _number(value: float | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _shares(row: "Row") -> str:
    if row.contents is None:
        return "-"
    flops = {dtype: total.amount for dtype, total in row.contents.matmuls.items()}
    whole = sum(flops.values()) or 1.0
    return ", ".join(f"{dtype} {x / whole:.0%}" for dtype, x in flops.items()) or "none"


def _verdict(row: "Row") -> str:
    if row.message:
        return f"does not fit. {row.message}"
    unit = _unit([row])
    size = f"{(row.peak or 0) / unit.bytes:.2f} {unit.name} at the peak"
    if row.memory is not None:
        verb = "fits" if row.fits else "does not fit"
        size += f", {verb} into {row.memory / GIB:.2f} GiB"
    if row.explained is None:
        return f"{size}."
    return f"{size}. The largest of the buffers that explain {row.explained:.0%} of it:"


def _buffer_cells(row: "Row") -> Iterable[list[str]]:
    here = f"{os.getcwd()}{os.sep}"
    for buffer in row.buffers:
        yield [
            f"{buffer.bytes / MIB:.1f}",
            str(buffer.copies),
            buffer.array,
            buffer.source.removeprefix(here),
            buffer.name,
        ]


def _collectives(row: "Row") -> list[str]:
    found = row.contents.collectives if row.contents else {}
    return [
        f"{name}: {total.times} a step, {total.amount / MIB:.2f} MiB on each device"
        for name, total in found.items()
    ]
