"""The tables of what precision saves, for the documentation."""

import pathlib
from collections.abc import Mapping

from compiled_steps import COMPILER_OPTIONS, FLOAT32, ways_for
from models import JOBS
from page import GIB, MIB, markdown_table

from jaxmp.report import chips
from jaxmp.report._rows import Row
from jaxmp.report.hlo._liveness import LiveBuffers

Rows = Mapping[tuple[str, str, str], Row]
"""Maps (model, way, target) to a row of a report."""

# What overviews of mixed precision quote: memory saved, and times as fast.
CLAIMS = {
    "BERT-Base": (0.47, 1.6),
    "GPT-2 small": (0.51, 1.8),
    "ResNet-50": (0.45, 1.4),
    "Transformer-XL base": (0.52, 1.9),
}
JAXMP = ("bfloat16 autocast", "bfloat16 apply_policy")
HEADLINE = (
    "All ways here are in bfloat16. Headings below name the batch and the optimizer "
    "of each model, which the charts share."
)


def page_section(rows: Rows, charts: Mapping[str, str]) -> str:
    """Writes the whole section, from rows and the file names of charts."""
    targets = list(dict.fromkeys(target for _, _, target in rows))
    parts = ["### Against the figures that are quoted", HEADLINE, headline(rows)]
    parts += [f"![memory of a training step]({charts['memory']})"]
    if "traffic" in charts:
        parts += [f"![traffic of a training step]({charts['traffic']})"]
    for model, job in JOBS.items():
        if not any(key[0] == model for key in rows):
            continue
        parts += [f"### {model}: {job.shape}"]
        for target in targets:
            if found := rows_of(rows, model, target):
                command = f'memory_table.py --model "{model}" --target {target}'
                parts += [f"On {chips[target].name} (`{command}`):", table(found)]
                parts += notes(model, target, found)
            else:
                parts += [f"Nothing was compiled for {chips[target].name}."]
        parts += shortfall(rows, model)
    return "\n\n".join(parts)


def rows_of(rows: Rows, model: str, target: str) -> dict[str, Row]:
    return {
        way: rows[model, way, target]
        for way in ways_for(model, target)
        if (model, way, target) in rows
    }


def saved(row: Row | None, reference: Row | None, name: str = "peak") -> float | None:
    """The share of float32's bytes that a row does without."""
    if row is None or reference is None:
        return None
    used, whole = getattr(row, name), getattr(reference, name)
    return None if not used or not whole else 1 - used / whole


def speed_up(row: Row | None, reference: Row | None) -> float | None:
    if row is None or reference is None:
        return None
    if row.roofline is None or reference.roofline is None:
        return None
    return reference.roofline.cost / row.roofline.cost


def best_of_jaxmp(rows: Rows, model: str, target: str) -> str | None:
    """jaxmp's way that needs the least memory, in bfloat16."""
    peaks = {}
    for way in JAXMP:
        row = rows.get((model, way, target))
        if row is not None and row.peak is not None:
            peaks[way] = row.peak
    return min(peaks, key=peaks.__getitem__, default=None)


def headline(rows: Rows) -> str:
    """One line per model: what is quoted, and what the H100's compiler says."""
    lines = []
    for model, (claim, claimed_speed) in CLAIMS.items():
        way = best_of_jaxmp(rows, model, "h100")
        if way is None or (model, FLOAT32, "h100") not in rows:
            continue
        reference = rows[model, FLOAT32, "h100"]
        row = rows[model, way, "h100"]
        hand = rows.get((model, "bfloat16 by hand", "h100"))
        part = saved(row, reference) or 0.0
        lines.append(
            (
                model,
                percent(claim),
                percent(saved(hand, reference)),
                f"{percent(part)} ({way.split()[1]})",
                "yes" if part >= claim else f"no, by {100 * (claim - part):.1f} points",
                claimed_speed,
                show(speed_up(hand, reference), "{:.2f}"),
                show(speed_up(row, reference), "{:.2f}"),
            )
        )
    columns = (
        "memory on the H100",
        "quoted",
        "by hand",
        "jaxmp",
        "reached",
        "speed-up quoted",
        "by hand*",
        "jaxmp*",
    )
    return markdown_table(columns, lines)


def table(found: Mapping[str, Row]) -> str:
    """All ways of a model on a target."""
    reference = found.get(FLOAT32)
    has_traffic = any(row.accessed for row in found.values())
    has_time = any(row.roofline and row.roofline.seconds for row in found.values())
    lines = []
    for way, row in found.items():
        cells = [way]
        if row.peak is None:
            cells += ["does not fit", ""]
        else:
            cells += [f"{row.peak / GIB:.2f}", percent(saved(row, reference))]
        if has_traffic:
            traffic = row.accessed and row.accessed / GIB
            cells += [show(traffic, "{:.1f}")]
            cells += [percent(saved(row, reference, "accessed"))]
        if has_time:
            seconds = row.roofline and row.roofline.seconds
            cells += [show(seconds and 1e3 * seconds, "{:.1f}")]
        cells += [show(speed_up(row, reference), "{:.2f}")]
        lines.append(cells)
    traffic = ["traffic GiB", "saved"] if has_traffic else []
    time = ["ms (estimate*)"] if has_time else []
    columns = ["", "memory GiB", "saved", *traffic, *time, "speed-up*"]
    return markdown_table(columns, lines)


def notes(model: str, target: str, found: Mapping[str, Row]) -> list[str]:
    """How a table was made, and what is missing from it, in one paragraph or none."""
    notes = []
    if options := COMPILER_OPTIONS.get((model, target)):
        shown = ", ".join(f"`{name}={value}`" for name, value in options.items())
        notes.append(f"Compiled with {shown}.")
    if any(row.peak and row.roofline is None for row in found.values()):
        notes.append(
            "A row without an estimate: the compiler could not write its program down."
        )
    reference = found.get(FLOAT32)
    if reference is not None and reference.peak is None:
        notes.append("Nothing can be compared with float32, which does not fit.")
    if missing := [way for way in ways_for(model, target) if way not in found]:
        notes.append(f"Not compiled for this page: {'; '.join(missing)}.")
    return [" ".join(notes)] if notes else []


def shortfall(rows: Rows, model: str) -> list[str]:
    """The largest buffers at the peak, where the quoted saving is not reached."""
    way = best_of_jaxmp(rows, model, "h100")
    reference = rows.get((model, FLOAT32, "h100"))
    if way is None or reference is None:
        return []
    row = rows[model, way, "h100"]
    claim, _ = CLAIMS[model]
    if (saved(row, reference) or 0.0) >= claim:
        return []
    lines = [
        (f"{buffer.bytes / MIB:.0f}", buffer.copies, buffer.array, made_at(buffer))
        for buffer in row.buffers
    ]
    intro = f"In the H100's memory at the peak of {way}, the largest first:"
    return [intro, markdown_table(["MiB", "count", "array", "made at"], lines)]


def made_at(buffer: LiveBuffers) -> str:
    """The scopes of a buffer, without what JAX's transformations add."""
    if not buffer.source:
        return f"`{buffer.name}`"
    file = pathlib.Path(buffer.source.split(" ")[0]).name
    return f"`{buffer.name.split('/', 1)[-1]}` ({file})"


def percent(part: float | None) -> str:
    return "" if part is None else f"{round(100 * part, 1) + 0.0:.1f} %"


def show(value: float | None, form: str) -> str:
    return "" if not value else form.format(value)
