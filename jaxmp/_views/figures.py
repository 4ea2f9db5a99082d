"""Figures; the only file that imports Matplotlib."""

import os
from typing import Any

from jaxmp.errors import MissingPackage

# Colours: what is good, kept, kept in part, lost, and neither.
GOOD, KEPT, PALE, LOST, GREY = "#2a8a3e", "#4878a8", "#a9c4de", "#c43c2c", "#707070"


def new_figure(width: float, height: float) -> Any:
    """Returns an empty `matplotlib.figure.Figure`, which opens no window.

    Args:
      width: in inches.
      height: in inches.

    Raises:
      MissingPackage: if Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage(
            "Plots need Matplotlib, which is not installed. Run: pip install matplotlib"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(ax: Any, width: float, height: float) -> Any:
    """Returns the axes, or new ones if they are None."""
    if ax is not None:
        return ax
    ax = new_figure(width, height).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def legend_below(ax: Any, columns: int) -> None:
    """Adds a legend under the axes."""
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def finished(ax: Any, path: str | os.PathLike[str] | None) -> Any:
    """Saves the figure of axes, if there is a path, and returns them."""
    if path is not None:
        ax.figure.savefig(path)
    return ax
