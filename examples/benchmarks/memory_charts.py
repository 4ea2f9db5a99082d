"""The charts of what precision saves, for the documentation."""

import pathlib
from collections.abc import Mapping
from typing import Any

from compiled_steps import FLOAT32
from memory_page import CLAIMS, Rows, saved

from jaxmp.report import chips

COLORS = {
    FLOAT32: "#c9c9c9",
    "bfloat16 by hand": "#edae49",
    "bfloat16 jmp": "#d1495b",
    "bfloat16 apply_policy": "#66a182",
    "bfloat16 autocast": "#00798c",
}


def draw(rows: Rows, path: pathlib.Path, name: str, title: str) -> bool:
    """Draws bytes relative to float32, a panel for each target.

    Args:
      rows: what is drawn.
      path: file to write.
      name: field of a row, such as `peak`.
      title: what the field is, in words.

    Returns:
      Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = shares_of_float32(rows, name)
    targets = list(dict.fromkeys(target for _, _, target in shares))
    models = [model for model in CLAIMS if any(key[0] == model for key in shares)]
    if not shares:
        return False
    pyplot.rcParams["svg.hashsalt"] = "jaxmp"
    figure, panels = pyplot.subplots(
        1,
        len(targets),
        figsize=(1.5 + 3.4 * max(len(targets), 2), 1.2 + 0.9 * len(models)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, target in zip(panels[0], targets, strict=True):
        for place, model in enumerate(models):
            found = {w: shares.get((model, w, target)) for w in COLORS}
            draw_bars(panel, place, {w: x for w, x in found.items() if x is not None})
            if name == "peak" and any(found.values()):
                quoted = 100 * (1 - CLAIMS[model][0])
                panel.plot([quoted] * 2, [place - 0.45, place + 0.45], "k:")
        panel.set(title=chips[target].name, xlabel=f"{title}, % of float32")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(models)), models)
    panels[0][0].invert_yaxis()
    handles = legend(with_quoted=name == "peak")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    pyplot.close(figure)
    return True


def shares_of_float32(rows: Rows, name: str) -> dict[tuple[str, str, str], float]:
    """Percentages of float32's bytes, for the ways that are drawn."""
    return {
        key: 100 * (1 - part)
        for key, row in rows.items()
        if key[1] in COLORS
        and (part := saved(row, rows.get((key[0], FLOAT32, key[2])), name)) is not None
    }


def draw_bars(panel: Any, place: int, shares: Mapping[str, float]) -> None:
    """Draws the bars of a model, packed around its place."""
    height = 0.8 / len(COLORS)
    top = place - height * len(shares) / 2
    for i, (way, share) in enumerate(shares.items()):
        y = top + (i + 0.5) * height
        panel.barh(y, share, height, color=COLORS[way])
        ink = "black" if way in (FLOAT32, "bfloat16 by hand") else "white"
        panel.text(2, y, f"{share:.0f}", va="center", fontsize=7, color=ink)


def legend(*, with_quoted: bool) -> list[Any]:
    """A patch for each way, and a line for what is quoted."""
    from matplotlib import lines, patches

    found: list[Any] = [
        patches.Rectangle((0, 0), 1, 1, color=color, label=way)
        for way, color in COLORS.items()
    ]
    if with_quoted:
        found.append(lines.Line2D([], [], color="k", linestyle=":", label="quoted"))
    return found
