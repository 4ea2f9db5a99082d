"""The values of a jaxpr while its plan runs: read in the dtypes that readers want."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.types import Array, Atom, Var
from jaxmp.casting.plan.states import FLOAT32
from jaxmp.casting.run._half_copies import HalfCopies


class Values:
    """The values of a jaxpr's variables, some of them in two dtypes."""

    def __init__(self):
        self.stored: dict[Any, Any] = {}
        self.narrow: dict[tuple[Any, np.dtype], Any] = {}
        self.widened: dict[Any, Any] = {}
        self.copies = HalfCopies()

    def write(self, variables: Sequence[Var], values: Sequence[Array]) -> None:
        self.stored.update(zip(variables, values, strict=True))

    def write_at(self, v: Var, dtype: Any, value: Array) -> None:
        if dtype is None:
            self.stored[v] = value
        else:
            self.narrow[v, dtype] = value
            self.stored.setdefault(v, value)

    def read(self, atom: Atom, dtype: Any) -> Any:
        if is_literal(atom):
            return literal(atom, dtype)
        if (atom, dtype) in self.narrow:
            return self.narrow[atom, dtype]
        if (copy := self.copies.claim(atom, dtype)) is not None:
            return copy
        value = self.stored[atom]
        return value if dtype is None else cast(value, dtype)

    def get(self, atom: Atom) -> Any:
        """Reads a value as it is stored."""
        return atom.val if is_literal(atom) else self.stored[atom]

    def half(self, atom: Atom, dtype: Any) -> Any:
        """Reads a copy in half that gets no gradient, and is made once for all."""
        return self.copies.make(atom, dtype, lambda: self.read(atom, dtype))

    def read_once(self, atom: Atom, dtype: Any) -> Any:
        """Reads a value, and widens it once for all who read it like this."""
        if dtype != FLOAT32 or is_literal(atom):
            return self.read(atom, dtype)
        if atom not in self.widened:
            self.widened[atom] = self.read(atom, dtype)
        return self.widened[atom]


def literal(atom: Atom, dtype: np.dtype | None) -> Any:
    """The value of a literal, in another dtype if one is given."""
    if dtype is None or atom.aval.dtype == dtype:
        return atom.val
    return np.asarray(atom.val).astype(dtype)


def cast(x: Any, dtype: np.dtype) -> Any:
    """Casts a floating value; one that has the dtype passes unchanged."""
    if jnp.result_type(x) == dtype:
        return x
    return jax.lax.convert_element_type(x, dtype)
