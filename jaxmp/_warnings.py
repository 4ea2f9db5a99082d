"""Warnings that point at the user's line, however deep below it jaxmp runs."""

import sys
import warnings

from jaxmp._jaxpr.sources import is_users


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither jaxmp's nor another library's.

    A fixed `stacklevel` would point into Optax, Flax or JAX as soon as one of them
    stands in between.

    Args:
      message: what is wrong and how to repair it.
      category: class of the warning.
    """
    warnings.warn(message, category, stacklevel=_users_level())


def _users_level() -> int:
    """The `stacklevel` that `warn` passes to reach the user's line."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if is_users(file) or file.startswith(("<stdin", "<ipython", "<doctest")):
            return level
        level, frame = level + 1, frame.f_back
    return level
