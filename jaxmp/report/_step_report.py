"""`StepReport`: what the compilers said about a step, as text, page and chart."""

import dataclasses
import importlib.util
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.numbers import GIB, MIB
from jaxmp._views.result import Result, plain
from jaxmp.report._rows import Row
from jaxmp.report._step_chart import bar_chart, speed_ups, unit_of
from jaxmp.report._wire_table import WIRE_CAPTION, WIRE_COLUMNS, wire_cells
from jaxmp.report.compile.chips import chips

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
    "ms (estimate*)",
    "speed-up*",
    "bound by",
    "half gains at most*",
)
_NOTE = (
    "* An estimate, not a measurement: for every operation the larger of matmul FLOPs "
    "over the chip's published peak and bytes over its bandwidth. {times}Speed-ups are "
    "over the first policy of a target. What stays in a TPU's own memory is free, so "
    "compare policies on a target, not targets. Sizes in {unit}."
)
_TIMES = (
    "Milliseconds are for one H100, where timed steps reached {share:.0%} of these "
    "peaks and each operation took {launch:.1f} microseconds besides. "
)
_BUFFER_COLUMNS = ("MiB", "count", "array", "made at", "name")


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
        """The rows as dicts of plain numbers and strings.

        The estimate has `speed_up` over the first row of the same target besides.
        """
        found = speed_ups(self.rows)
        return [_as_dict(row, x) for row, x in zip(self.rows, found, strict=True)]

    def to_png(self, path: Any) -> None:
        """Writes a bar chart of memory and of the estimated speed-up.

        Args:
          path: file to write.

        Raises:
          MissingPackage: if Matplotlib is not installed.
        """
        Path(path).write_bytes(bar_chart(self.rows))

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
            chart = bar_chart(self.rows)
            parts.insert(0, _html.image(chart, "memory and estimated speed-up"))
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


def _as_dict(row: Row, speed_up: float | None) -> dict[str, Any]:
    data = plain(row)
    if row.roofline is not None:
        estimate = row.roofline
        data["roofline"]["bound"] = estimate.bound
        data["roofline"]["largest_gain"] = estimate.largest_gain
        data["roofline"]["speed_up"] = speed_up
    return data


def _indented(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return textwrap.indent(_table.text_table(columns, cells), "  ")


def _note(rows: Iterable[Row]) -> str:
    rows = list(rows)
    calibration, times = chips["h100"].calibration, ""
    is_timed = any(row.roofline and row.roofline.seconds for row in rows)
    if is_timed and calibration is not None:
        share, launch = calibration.share_of_peaks, 1e6 * calibration.launch
        times = _TIMES.format(share=share, launch=launch)
    return _NOTE.format(times=times, unit=unit_of(rows)[0])


def _cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    first, (_, unit) = {}, unit_of(rows)
    for row, speed_up in zip(rows, speed_ups(rows), strict=True):
        whole = first.setdefault(row.target, row.peak)
        saved = "" if not whole or row.peak is None else f"{1 - row.peak / whole:.0%}"
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
            *_estimates(row, speed_up),
        ]


def _estimates(row: Row, speed_up: float | None) -> list[str]:
    estimate = row.roofline
    if estimate is None:
        return ["-"] * 4
    seconds = estimate.seconds
    return [
        "-" if seconds is None else f"{1e3 * seconds:.3g}",
        "-" if speed_up is None else f"{speed_up:.2f}x",
        estimate.bound,
        f"{estimate.largest_gain:.2f}x",
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
    name, unit = unit_of([row])
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
