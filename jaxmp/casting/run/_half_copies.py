"""Copies of weights in half that more than one operation reads.

Each reader of a weight casts it for itself, so that its gradients are summed in
float32. An operation that gives the gradient to the stored weight needs no cast of its
own: a lookup takes the copy in half that another one reads. Several devices, which
gather a weight that is divided among them, then gather it once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.types import Atom, Eqn, Var


class HalfCopies:
    """The copies that have been made, and who has a gradient through one."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Var, np.dtype], Any] = {}
        self._claimed: set[tuple[Var, np.dtype]] = set()
        self._casts: set[Var] = set()
        self._stored: dict[Var, Var] = {}
        self._transposed: dict[Var, Var] = {}

    def make(self, atom: Atom, dtype: np.dtype, cast: Callable[[], Any]) -> Any:
        """Gives a copy to a reader whose gradient goes elsewhere; casts it once."""
        key = atom, dtype
        if key not in self._copies:
            self._copies[key] = cast()
        return self._copies[key]

    def claim(self, atom: Atom, dtype: Any) -> Any:
        """Gives a copy, if there is one, to the one reader that has a gradient there.

        The gradients of two would be summed in half.
        """
        if not self._copies or is_literal(atom):
            return None
        key = atom, dtype
        if key not in self._copies or key in self._claimed:
            return None
        self._claimed.add(key)
        return self._copies[key]

    def claim_cast(self, eqn: Eqn) -> list[Any]:
        """Gives a copy, if there is one, as the result of a cast of the program's."""
        if not self._copies or eqn.primitive.name != CAST:
            return []
        copy = self.claim(eqn.invars[0], eqn.params["new_dtype"])
        if copy is None:
            return []
        self._casts.add(eqn.outvars[0])
        return [copy]

    def note_cast(self, eqn: Eqn, operand: Any, stored: Any) -> None:
        """Remembers a cast of the program's that a matrix with a copy passed unchanged.

        Args:
          eqn: the cast.
          operand: what it read: a copy, or the matrix as it is stored.
          stored: the matrix.
        """
        (source,), (result,) = eqn.invars, eqn.outvars
        copies = [copy for (v, _), copy in self._copies.items() if v is source]
        if any(copy is operand for copy in copies):
            self._casts.add(result)
        elif copies and operand is stored:
            self._stored[result] = source

    def note_transpose(self, eqn: Eqn) -> None:
        """Remembers the transpose of a matrix that has a copy."""
        if not self._copies or eqn.primitive.name != "transpose":
            return
        (source,), (result,) = eqn.invars, eqn.outvars
        source = self._stored.get(source, source)
        has_copy = source in self._casts or any(v is source for v, _ in self._copies)
        if has_copy and tuple(eqn.params["permutation"]) == (1, 0):
            self._transposed[result] = source

    def without_transposes(
        self, eqn: Eqn, params: Mapping[str, Any]
    ) -> tuple[Sequence[Atom], Mapping[str, Any]]:
        """A matmul that reads the matrices themselves in place of their transposes.

        Devices would gather a matrix and its transpose apart.
        """
        if not self._transposed or eqn.primitive.name != "dot_general":
            return eqn.invars, params
        invars = list(eqn.invars)
        contracted, batch = map(list, params["dimension_numbers"])
        for i, v in enumerate(invars):
            if not is_literal(v) and v in self._transposed and not batch[i]:
                invars[i] = self._transposed[v]
                contracted[i] = tuple(1 - axis for axis in contracted[i])
        numbers = tuple(contracted), tuple(batch)
        return invars, {**params, "dimension_numbers": numbers}
