"""`branch`: a conditional that computes one side only, compiled or not."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.core

T = TypeVar("T")


def branch(pred: jax.Array, on_true: Callable[[], T], on_false: Callable[[], T]) -> T:
    """`jax.lax.cond`, which outside of a compiled function would compile every time."""
    if isinstance(pred, jax.core.Tracer):
        return jax.lax.cond(pred, on_true, on_false)
    return on_true() if pred else on_false()
