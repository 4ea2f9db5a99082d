"""Prints what eight devices send each other in a training step.

    pip install 'jaxmp[targets]'
    python examples/benchmarks/collectives.py
    python examples/benchmarks/collectives.py --only fsdp --target h100:8
    python examples/benchmarks/collectives.py --write docs/distributed.md

XLA's own compilers for the H100 and the TPU v5e write the programs, and `jaxmp.report`
counts in them: MiB that each device sends in a step. Nothing runs. The first table has
a row for each case. The second compares the worst of them with the goals. A case takes
15 seconds to compile; answers are kept on disk, so a second run is quick.

The small model is a transformer of two layers, width 256, vocabulary 2048 and an untied
head: 2.62 million weights. The tied model has width 512, vocabulary 8192 and a tied
table. A batch is 32 x 256 tokens; the optimizer is AdamW behind a clip by the norm.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from page import MIB, markdown_table, write_section
from ring_rounding import rounding_table
from sharded_cases import GOALS, H100, SECTIONS, V5E, Goal
from sharded_steps import Case, sharded_step

from jaxmp.report import compile_step_of

TARGETS = (H100, V5E)
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
KINDS = {
    "all-gather": "gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "collective-permute": "permute",
    "all-to-all": "all-to-all",
}
SMALLEST = 0.005
"""MiB below which a collective, such as that of a loss, is not shown."""

Measured = Mapping[tuple[Case, str], Any]
"""Rows of reports, by case and target."""


def measure(
    cases: Iterable[Case], targets: Sequence[str], *, progress: bool | None = None
) -> dict[tuple[Case, str], Any]:
    """Compiles cases for targets, one target after the other.

    Args:
      cases: what to compile.
      targets: names of eight devices.
      progress: whether to report on standard error; by default in a terminal.
    """
    named = {str(case): case for case in cases}
    rows = {}
    for target in targets:
        report = compile_step_of(
            lambda name: sharded_step(named[name]),
            policies=list(named),
            targets=[target],
            progress=progress,
        )
        rows |= {(named[row.policy], target): row for row in report.rows}
    return rows


def wire(row: Any) -> float:
    """MiB that each device sends in a step."""
    return sum(one.wire for one in row.contents.collectives) / MIB


def sent(row: Any) -> str:
    """What is sent, by kind and dtype: MiB, and the number of arrays."""
    parts = []
    for one in row.contents.collectives:
        if one.wire > SMALLEST * MIB:
            kind = KINDS.get(one.kind, one.kind)
            dtype = SHORT.get(one.dtype, one.dtype)
            parts.append(f"{kind} {dtype} {one.wire / MIB:.2f} ({one.times})")
    return ", ".join(parts)


def case_table(cases: Iterable[Case], rows: Measured, target: str) -> str:
    """A row for each case on one target, as Markdown."""
    columns = ["model", "layout", "written as", "way", "reduce", "batch", "MiB", "sent"]
    body = []
    for case in cases:
        row = rows[case, target]
        labels = (case.model, case.layout, case.written, case.way)
        labels = (*labels, case.reduce or "", case.window or "whole")
        body.append([*labels, f"{wire(row):.2f}", sent(row)])
    return markdown_table(columns, body)


def reached(goal: Goal, rows: Measured, target: str) -> float:
    """The most that a case of a goal sends, or its factor over the cases by hand."""
    most = max(wire(rows[case, target]) for case in goal.cases)
    if not goal.by_hand:
        return most
    return max(
        wire(rows[case, target]) / wire(rows[hand, target])
        for case in goal.cases
        for hand in goal.by_hand
        if hand.written == case.written
    )


def goal_table(rows: Measured, targets: Sequence[str]) -> str:
    """The goals, what was measured, and whether they are met, as Markdown."""
    body = []
    for goal in GOALS:
        for target in targets:
            needed = [(case, target) for case in (*goal.cases, *goal.by_hand)]
            if not all(key in rows for key in needed):
                continue
            # To the digits that goals are written in.
            digits = 2 if goal.by_hand else 1
            now = round(reached(goal, rows, target), 2)
            most, before = goal.most[target], goal.before[target]
            verdict = "met" if round(now, digits) <= most else "missed"
            was = "" if before is None else f"{before:.{digits}f}"
            body.append([goal.name, target, was, f"{now:.2f}", f"{most:g}", verdict])
    columns = ["goal", "target", "before", "now", "at most", "is"]
    return markdown_table(columns, body)


NAMES = {
    "fsdp": "FSDP",
    "tied": "FSDP, the tied model",
    "scan": "FSDP, layers in a loop",
    "remat": "FSDP, layers computed again",
    "data_parallel": "data parallel",
    "tensor_parallel": "FSDP + TP, 4 x 2",
}
"""What the page calls the sections that compare the ways."""


def traffic_table(rows: Measured) -> str:
    """MiB by hand, by default and with `reduce=float32`, each its worst case."""
    body = []
    for section, name in NAMES.items():
        cells = []
        for target in TARGETS:
            found: dict[str, list[float]] = {"by hand": [], "": [], "float32": []}
            for case in SECTIONS[section]:
                way = case.way if case.way in found else case.reduce or ""
                found[way].append(wire(rows[case, target]))
            cells += [f"{max(mib):.1f}" for mib in found.values()]
        body.append([name, *cells])
    ways = ("by hand", "jaxmp", "reduce=float32")
    columns = [f"{target.split(':')[0]}, {way}" for target in TARGETS for way in ways]
    return markdown_table(["layout", *columns], body)


def accumulation_table(rows: Measured) -> str:
    """MiB of a step of four micro-batches, for each target."""
    body = []
    for case in SECTIONS["accumulation"]:
        how = "micro_batches=4" + (', data_axes="data"' if case.data_axes else "")
        how += f', gather="{case.gather}"' if case.gather else ""
        reduced_in = case.reduce or "bfloat16, tables in float32"
        mib = [f"{wire(rows[case, target]):.1f}" for target in TARGETS]
        body.append([case.layout, f"`{how}`", reduced_in, *mib])
    return markdown_table(["layout", "options", "reduced in", *TARGETS], body)


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases of some sections, or of all."""
    return [case for name in only or SECTIONS for case in SECTIONS[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[*SECTIONS, "rounding"],
        help="what to print; by default everything",
    )
    parser.add_argument("--target", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--write", metavar="PAGE", help="write the page's tables")
    arguments = parser.parse_args()
    if arguments.write:
        rows = measure(chosen([]), TARGETS, progress=True)
        write_section(arguments.write, "rounding", rounding_table())
        write_section(arguments.write, "traffic", traffic_table(rows))
        write_section(arguments.write, "accumulation", accumulation_table(rows))
        return
    if not arguments.only or "rounding" in arguments.only:
        print(f"Relative error of a sum over devices\n\n{rounding_table()}\n")
    sections = [name for name in arguments.only if name != "rounding"]
    if arguments.only and not sections:
        return
    cases = chosen(sections)
    rows = measure(cases, arguments.target, progress=True)
    for target in arguments.target:
        print(f"{target}: MiB on the wire per device and step\n")
        print(f"{case_table(cases, rows, target)}\n")
    print(f"Goals\n\n{goal_table(rows, arguments.target)}")


if __name__ == "__main__":
    main()
