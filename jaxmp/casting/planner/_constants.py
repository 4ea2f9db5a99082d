"""Constants that a half dtype cannot hold: they would become infinite, or zero."""

from collections.abc import Sequence
from typing import Any

import jax.core
import numpy as np

from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.primitives import LAYOUT
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr

_LARGEST_READ = 1 << 16


class Constants:
    """What is known of the values of a jaxpr's constants, while it is planned.

    The magnitude of a literal is followed through operations that only move it, as in
    `jnp.where(mask, scores, -1e9)`.
    """

    def __init__(self, dtype: np.dtype, jaxpr: Jaxpr, consts: Sequence[Any]):
        self.values: dict[Any, np.ndarray] = {}
        for v, value in zip(jaxpr.constvars, consts, strict=False):
            if castable_dtype(v) is None or v.aval.size > _LARGEST_READ:
                continue
            if not isinstance(value, jax.core.Tracer):
                self.values[v] = np.asarray(value, np.float32)

    def is_constant(self, atom: Atom) -> bool:
        """True if the value of an operand is known."""
        return is_literal(atom) or atom in self.values

    def carry(self, eqn: Eqn) -> None:
        """Remembers a constant that an equation only moves."""
        if eqn.primitive.name in LAYOUT and self.is_constant(eqn.invars[0]):
            self.values[eqn.outvars[0]] = self._value(eqn.invars[0])

    def unfit(self, atoms: Sequence[Any], dtype: np.dtype) -> str | None:
        """Names the first constant among operands that a dtype cannot hold, or None."""
        for atom in atoms:
            if castable_dtype(atom) is None or not self.is_constant(atom):
                continue
            value = self._value(atom)
            with np.errstate(over="ignore", under="ignore"):
                narrow = value.astype(dtype).astype(np.float32)
            lost = np.isinf(narrow) & np.isfinite(value)
            if lost.any():
                return f"constant {value[lost].flat[0]:g} is infinite in {dtype}"
            lost = (narrow == 0) & (value != 0)
            if lost.any():
                return f"constant {value[lost].flat[0]:g} is 0 in {dtype}"
        return None

    def _value(self, atom: Atom) -> np.ndarray:
        value = atom.val if is_literal(atom) else self.values[atom]
        return np.asarray(value, np.float32)
