"""What precision saves in training four well-known models, by XLA's own compilers.

BERT-Base, GPT-2 small, ResNet-50 and Transformer-XL base are compiled for an H100, a
TPU v5e and a TPU v6e, without any of these machines. Nothing runs.

    pip install 'jaxmp[test,targets]'
    python examples/benchmarks/memory_table.py --write docs/benchmarks.md
    python examples/benchmarks/memory_table.py \\
        --model "GPT-2 small" --target tpu-v5e --way "bfloat16 autocast"

All of it takes hours, most of them for TPUs. Every answer is kept in
`out/memory_table`, so that a run can be interrupted; `--stored` compiles nothing.
"""

import argparse
import pathlib

import memory_charts
import memory_page
from compiled_steps import TARGETS, WAYS, row, ways_for
from compiled_updates import prepare_to_compile
from memory_page import Rows
from models import JOBS
from page import GIB, write_section

from jaxmp.report._rows import Row


def describe(found: Row) -> str:
    if found.peak is None:
        return f"does not fit: {found.message[:100]}"
    accessed = f", accessed {found.accessed / GIB:.2f} GiB" if found.accessed else ""
    moved = (
        f", through memory {found.roofline.bytes / GIB:.2f} GiB, "
        f"{found.roofline.operations} operations"
        if found.roofline
        else ""
    )
    return f"peak {found.peak / GIB:.3f} GiB{accessed}{moved}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--model", action="append", choices=list(JOBS))
    parser.add_argument("--way", action="append", choices=list(WAYS))
    parser.add_argument("--stored", action="store_true", help="compile nothing")
    parser.add_argument("--write", metavar="PAGE", help="put tables and charts there")
    arguments = parser.parse_args()
    prepare_to_compile()
    rows = {}
    for target in arguments.target or TARGETS:
        for model in arguments.model or JOBS:
            for way in arguments.way or ways_for(model, target):
                found = row(model, way, target, only_stored=arguments.stored)
                if found is None:
                    continue
                rows[model, way, target] = found
                print(
                    f"{target:8} {model:20} {way:42} {describe(found)} "
                    f"({found.seconds_to_compile:.0f} s to compile)",
                    flush=True,
                )
    if arguments.write:
        write(rows, pathlib.Path(arguments.write))


def write(rows: Rows, page: pathlib.Path) -> None:
    """Writes the tables into a page, and the charts beside it."""
    charts = {}
    for name, field in {"memory": "peak", "traffic": "accessed"}.items():
        path = page.with_name(f"{page.stem}_{name}.svg")
        if memory_charts.draw(rows, path, field, name):
            charts[name] = path.name
    write_section(page, "memory", memory_page.page_section(rows, charts))


if __name__ == "__main__":
    main()
