"""The values of a jaxpr while its plan runs: read in the dtypes that readers want."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.execution import bind
from jaxmp._jaxpr.primitives import GATHERS, PLACEMENTS
from jaxmp._jaxpr.types import Array, Atom, Eqn, Var
from jaxmp._tree import HALF
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.plan.states import FLOAT32, Kind
from jaxmp.casting.run._gradient_of_stored import of_stored
from jaxmp.casting.run._half_copies import HalfCopies
from jaxmp.casting.run._wide_gradients import Weight


class Values:
    """The values of a jaxpr's variables, some of them in two dtypes."""

    def __init__(self):
        self.stored: dict[Any, Any] = {}
        self.narrow: dict[tuple[Any, np.dtype], Any] = {}
        self.widened: dict[Any, Any] = {}
        self.copies = HalfCopies()
        self.gathered: dict[Any, Eqn] = {}

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
        if dtype in HALF and atom in self.gathered:
            return self.gather(self.gathered[atom], dtype)
        value = self.stored[atom]
        return value if dtype is None else cast(value, dtype)

    def gather(self, eqn: Eqn, dtype: np.dtype) -> Any:
        """Brings a weight together that is divided among devices, in half.

        Where its gradient is added up on the way back, that is done in the dtype of the
        weight.
        """
        weight = eqn.invars[0]
        if eqn.primitive.name in PLACEMENTS:
            return bind(eqn, [self.read(weight, dtype)])[0]

        def value(half: Array, stored: Array) -> Array:
            return bind(eqn, [half])[0]

        def tangent(tangent: Array, stored: Array) -> Array:
            return bind(eqn, [tangent])[0]

        return of_stored(value, tangent, self.half(weight, dtype), self.get(weight))

    def get(self, atom: Atom) -> Any:
        """Reads a value as it is stored."""
        return atom.val if is_literal(atom) else self.stored[atom]

    def half(self, atom: Atom, dtype: Any) -> Any:
        """Reads a copy in half that gets no gradient, and is made once for all."""

        def cast() -> Any:
            eqn = self.gathered.get(atom)
            if eqn is None:
                return self.read(atom, dtype)
            return bind(eqn, [self.half(eqn.invars[0], dtype)])[0]

        return self.copies.make(atom, dtype, cast)

    def weight(self, atom: Atom) -> Weight:
        """A weight as it is stored, on whatever devices, and how it gets here."""
        eqn = self.gathered.get(atom)
        if eqn is None:
            return Weight(self.get(atom))
        return self.weight(eqn.invars[0]).then(lambda x: bind(eqn, [x])[0])

    def note_gather(self, plan: EqnPlan) -> None:
        """Remembers a weight that is brought together: half of it may be enough."""
        (state,) = plan.out_states if len(plan.out_states) == 1 else (None,)
        is_weight = state is not None and state.kind in (Kind.NEUTRAL, Kind.WEIGHT)
        is_gather = plan.eqn.primitive.name in GATHERS
        if is_weight and is_gather and not is_literal(plan.eqn.invars[0]):
            self.gathered[plan.eqn.outvars[0]] = plan.eqn

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
