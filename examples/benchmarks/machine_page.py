"""The tables of what training steps take on real machines."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compiled_steps import FLOAT32
from machine_programs import CLIP, MODELS, UPDATE, UPDATES, WAYS
from machine_records import Machine, Record
from page import GIB, markdown_table

CPU_REMARK = "The CPU emulates half precision: its times say nothing of a GPU or TPU."
NOTHING = "No machine has been timed for this page yet."
COLUMNS = (
    *("ms per step", "least to most", "host ms", "planned GiB", "allocated GiB"),
    *("trace s", "compile s"),
)


class Run(NamedTuple):
    """Where records belong together: one machine, and programs made in one way."""

    machine: Machine
    options: str


def page_section(records: Iterable[Record]) -> str:
    """The section for the documentation; tiny programs are for tests, and left out.

    Raises:
      ValueError: if a record is of a CPU.
    """
    records = [record for record in records if not record.tiny]
    for record in records:
        if record.machine.platform == "cpu":
            raise ValueError(
                f"{record.model}, {record.way} was timed on a CPU. {CPU_REMARK} Write "
                "the page from the records of an accelerator (--records FOLDER)."
            )
    return tables(records) if records else NOTHING


def tables(records: Sequence[Record]) -> str:
    """The tables of every machine; PyTorch's rows stand in those of its device."""
    own = [record for record in records if not of_torch(record)]
    torch = [record for record in records if of_torch(record)]
    parts = []
    for run in dict.fromkeys(Run(r.machine, r.options) for r in own or torch):
        rows = [r for r in own or torch if Run(r.machine, r.options) == run]
        parts += [f"### On {run.machine.device}", heading(run, rows)]
        if own:
            rows += [r for r in torch if r.machine.device == run.machine.device]
        for model in (*MODELS, UPDATE):
            parts += of_model(model, [row for row in rows if row.model == model])
        parts += not_taken(rows)
    return "\n\n".join(parts)


def of_torch(record: Record) -> bool:
    return record.machine.software.startswith("torch")


def heading(run: Run, rows: Sequence[Record]) -> str:
    """What it ran with, and how times were taken, in one paragraph."""
    machine = run.machine
    software = [machine.software, machine.driver and f"driver {machine.driver}"]
    rounds = {(len(row.ms), row.steps) for row in rows if row.ms}
    times = " or ".join(f"{count} rounds of {steps} steps" for count, steps in rounds)
    parts = [f"{', '.join(filter(None, software))}."]
    if times:
        parts += [f"Each time is the median of {times}, beside the least and the most."]
    if run.options:
        parts += [f"Compiled with `{run.options}`."]
    if machine.platform == "cpu":
        parts += [CPU_REMARK]
    return " ".join(parts)


def of_model(model: str, rows: Sequence[Record]) -> list[str]:
    """The table of one model and the errors behind it; nothing without rows."""
    if not rows:
        return []
    names = [*WAYS, *UPDATES, *(row.way for row in rows if of_torch(row))]
    rows = sorted(rows, key=lambda row: names.index(row.way))
    timed = {row.way: row for row in rows if row.ms}
    is_update = model == UPDATE
    ratios = ("x the clip",) if is_update else ("x by hand", "speed-up")
    shapes = {} if is_update else dict.fromkeys(row.shape for row in rows if row.shape)
    lines = []
    for row in (row for row in rows if row.ms):
        if is_update:
            cells = [ratio(row, timed.get(CLIP))]
        else:
            hand = timed.get(f"{row.way.split()[0]} by hand")
            cells = [ratio(row, hand), ratio(timed.get(FLOAT32), row)]
        way = f"{row.way}, {row.shape}" if is_update else name(row)
        lines.append([way, *figures(row), *cells])
    parts = [f"**{model}**" + (f": {', '.join(shapes)}" if shapes else "")]
    if lines:
        parts += [markdown_table(["", *COLUMNS, *ratios], lines)]
    failed = [f"- {name(row)}: {row.error}" for row in rows if not row.ms]
    return [*parts, "\n".join(["Did not run:", "", *failed])] if failed else parts


def name(row: Record) -> str:
    return f"{row.machine.software}: {row.way}" if of_torch(row) else row.way


def figures(row: Record) -> list[str]:
    """The cells under `COLUMNS`."""
    sizes = [row.planned, row.allocated]
    seconds = [row.trace_seconds, row.compile_seconds]
    return [
        f"{row.median:.2f}",
        f"{min(row.ms):.2f} to {max(row.ms):.2f}",
        "" if row.host_ms is None else f"{row.host_ms:.2f}",
        *("" if x is None else f"{x / GIB:.2f}" for x in sizes),
        *("" if x is None else f"{x:.1f}" for x in seconds),
    ]


def ratio(one: Record | None, other: Record | None) -> str:
    return f"{one.median / other.median:.2f}" if one and other else ""


def not_taken(rows: Sequence[Record]) -> list[str]:
    """What a whole run times and these records lack, in one paragraph or none."""
    found = {(row.model, row.way) for row in rows}
    if all(of_torch(row) for row in rows):
        return []
    wanted = {model: list(WAYS) for model in MODELS} | {UPDATE: list(UPDATES)}
    missing = []
    for model, names in wanted.items():
        lacking = [x for x in names if (model, x) not in found]
        if lacking:
            what = "all" if lacking == names else ", ".join(lacking)
            missing.append(f"{model} ({what})")
    return [f"Not taken: {'; '.join(missing)}."] if missing else []
