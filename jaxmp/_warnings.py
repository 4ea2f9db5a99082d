"""Warnings that point at the user's line, however deep jaxmp was called from."""

import sys
import warnings
from types import FrameType

from jaxmp._sources import is_users


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither jaxmp's nor another library's.

    A number of frames, as `warnings.warn` takes it, would point into Optax, Flax or JAX
    as soon as one of them stands in between.

    Args:
      message: what is wrong, and the repair.
      category: class of the warning.
    """
    frame = _users_frame()
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=registry,
        source=None,
    )


def _users_frame() -> FrameType:
    outermost = frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_users(file) or file.startswith(("<stdin", "<ipython", "<doctest")):
            return frame
        outermost, frame = frame, frame.f_back
    return outermost
