"""The table of what devices send each other, for text and pages."""

import os

from jaxmp._views.numbers import MIB
from jaxmp.report._rows import Row
from jaxmp.report.hlo._collectives import Collective

WIRE_COLUMNS = (
    "collective",
    "dtype",
    "devices",
    "times",
    "MiB whole",
    "MiB on the wire",
    "most at",
)
WIRE_CAPTION = "What each device sends in a step:"


def wire_cells(row: Row) -> list[list[str]]:
    """The cells of a row's table, with a total; empty if nothing is sent."""
    found = row.contents.collectives if row.contents else ()
    if not found:
        return []
    cells = [_cells(one) for one in found]
    times, whole = sum(one.times for one in found), sum(one.bytes for one in found)
    wire = sum(one.wire for one in found)
    total = ["total", "", "", str(times), _mib(whole), _mib(wire), ""]
    return [*cells, total] if len(cells) > 1 else cells


def _cells(one: Collective) -> list[str]:
    here = f"{os.getcwd()}{os.sep}"
    sizes = [_mib(one.bytes), _mib(one.wire)]
    line = one.source.removeprefix(here)
    return [one.kind, one.dtype, str(one.group), str(one.times), *sizes, line]


def _mib(size: float) -> str:
    """Bytes in MiB; a little is not nothing."""
    return "<0.01" if 0 < size < 0.005 * MIB else f"{size / MIB:.2f}"
