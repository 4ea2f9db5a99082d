"""Atoms: what equations read and write, variables and literals."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.extend.core
import numpy as np

from jaxmp import _tree


def is_literal(atom: Any) -> bool:
    """True for a constant that is written into an equation."""
    return isinstance(atom, jax.extend.core.Literal)


def variables(atoms: Iterable[Any]) -> Iterator[Any]:
    """The atoms that are no literals, in order."""
    return (atom for atom in atoms if not is_literal(atom))


def castable_dtype(atom: Any) -> np.dtype | None:
    """The dtype of a float16, bfloat16 or float32 value; None for all others."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype if dtype in _tree.CASTABLE else None


def is_half(atom: Any) -> bool:
    """True for float16 and bfloat16."""
    return getattr(atom.aval, "dtype", None) in _tree.HALF


def is_integer(atom: Any) -> bool:
    """True for integers and booleans, which a cast to a float is no decision about."""
    return getattr(getattr(atom.aval, "dtype", None), "kind", "") in ("i", "u", "b")
