"""The picture of the front page: the memory of one training step by precision.

GPT-2 small, a batch of 8 x 1024 tokens, AdamW, compiled for an H100 by XLA's own
compiler. Nothing runs; no GPU is needed.

    pip install 'jaxmp[test,targets]'
    python examples/benchmarks/memory_picture.py --out docs/memory_by_precision.svg

A first run takes some ten minutes; answers are kept in `out/memory_table`.
"""

import argparse
from collections.abc import Mapping

from compiled_steps import row
from compiled_updates import prepare_to_compile
from page import GIB

from jaxmp.report._rows import Row

MODEL, TARGET = "GPT-2 small", "h100"
# What the picture calls each way of `compiled_steps`.
BARS = {
    "float32": "float32",
    "bfloat16 by hand": "dtype=bfloat16 by hand",
    "bfloat16 autocast": 'jaxmp "mixed_bfloat16"',
    "float8 autocast": 'jaxmp "mixed_fp8"',
}
ARGUMENTS, TEMPORARY = "#4c78a8", "#f2a541"


def draw(rows: Mapping[str, Row], path: str) -> None:
    """Draws a bar for each way: what the step is given, and what it makes and drops."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "jaxmp"
    figure, axes = pyplot.subplots(figsize=(7.2, 1.9), layout="constrained")
    names = [BARS[way] for way in rows]
    given = [found.arguments / GIB for found in rows.values()]
    made = [(found.peak - found.arguments) / GIB for found in rows.values()]
    axes.barh(names, given, color=ARGUMENTS, label="weights, moments, batch")
    axes.barh(names, made, left=given, color=TEMPORARY, label="made during the step")
    for place, found in enumerate(rows.values()):
        saved = 1 - found.peak / rows["float32"].peak
        note = f"  {found.peak / GIB:.1f} GiB" + (f", -{saved:.0%}" if saved else "")
        axes.text(found.peak / GIB, place, note, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="memory of a training step, GiB")
    axes.set_xlim(right=1.2 * max(found.peak for found in rows.values()) / GIB)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Prints a line for each bar, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to draw the picture")
    arguments = parser.parse_args()
    prepare_to_compile()
    rows = {}
    for way, name in BARS.items():
        rows[way] = row(MODEL, way, TARGET)
        print(f"{name:24} {rows[way].peak / GIB:6.2f} GiB", flush=True)
    if arguments.out:
        draw(rows, arguments.out)


if __name__ == "__main__":
    main()
