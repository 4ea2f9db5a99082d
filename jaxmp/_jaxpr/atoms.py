"""Atoms: what equations read and write, variables and literals."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.extend.core
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.types import Atom


def is_literal(atom: Atom) -> bool:
    """True for a constant that is written into an equation."""
    return isinstance(atom, jax.extend.core.Literal)


def variables(atoms: Iterable[Any]) -> Iterator[Any]:
    """The atoms that are not literals, in order."""
    return (atom for atom in atoms if not is_literal(atom))


def castable_dtype(atom: Atom) -> np.dtype | None:
    """The dtype of a float16, bfloat16 or float32 value; None for all others."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype if dtype in _tree.CASTABLE else None


def is_half(atom: Atom) -> bool:
    """True for float16 and bfloat16."""
    return getattr(atom.aval, "dtype", None) in _tree.HALF


def is_integer(atom: Atom) -> bool:
    """True for integers and booleans."""
    return getattr(getattr(atom.aval, "dtype", None), "kind", "") in ("i", "u", "b")
