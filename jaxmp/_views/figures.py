"""Matplotlib, which draws whatever is drawn; the only file that imports it."""

from typing import Any

from jaxmp.errors import MissingPackage


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
