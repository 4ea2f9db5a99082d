"""Which low values feed which float32 island, while a plan is made."""

from collections.abc import Sequence
from typing import Any

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.primitives import LAYOUT
from jaxmp._jaxpr.types import Eqn
from jaxmp.casting.plan.states import State


class IslandInputs:
    """Union-find over the results of islands, with the low inputs of each island."""

    def __init__(self):
        self.parent: dict[Any, Any] = {}
        self.inputs: dict[Any, set[Any]] = {}
        self.source: dict[Any, Any] = {}

    def find(self, v: Any) -> Any:
        """The value that stands for the island of another."""
        while self.parent[v] is not v:
            self.parent[v] = v = self.parent[self.parent[v]]
        return v

    def origin(self, v: Any) -> Any:
        """The value that a low value was moved from."""
        return self.source.get(v, v)

    def add(self, eqn: Eqn, states: Sequence[State | None]) -> None:
        """An equation joins the islands of its operands."""
        roots = {self.find(v) for v in _variables(eqn) if v in self.parent}
        low_inputs = {
            self.origin(v)
            for v, s in zip(eqn.invars, states, strict=True)
            if s is not None and s.is_low and not is_literal(v)
        }
        root = max(roots, key=lambda r: len(self.inputs[r]), default=eqn.outvars[0])
        self.parent.setdefault(root, root)
        inputs = self.inputs.setdefault(root, set())
        inputs |= low_inputs
        for other in roots - {root}:
            self.parent[other] = root
            inputs |= self.inputs.pop(other)
        for v in eqn.outvars:
            self.parent[v] = root

    def moved(self, eqn: Eqn) -> None:
        """A low value that was only reshaped or moved is still the same value."""
        if eqn.primitive.name in LAYOUT and not is_literal(eqn.invars[0]):
            self.source[eqn.outvars[0]] = self.origin(eqn.invars[0])

    def covers(self, eqn: Eqn, states: Sequence[State | None]) -> bool:
        """Whether every low operand feeds the island of the others."""
        roots = {self.find(v) for v in _variables(eqn) if v in self.parent}
        fed = set().union(*(self.inputs[root] for root in roots))
        return all(
            self.origin(v) in fed
            for v, s in zip(eqn.invars, states, strict=True)
            if s is not None and s.is_low and not is_literal(v)
        )


def _variables(eqn: Eqn) -> list[Any]:
    return [v for v in eqn.invars if not is_literal(v)]
