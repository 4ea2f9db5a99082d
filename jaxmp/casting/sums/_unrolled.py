"""Finds sums that are written term by term, without a loop.

A Python loop over time leaves a chain of additions, each to the result of the one
before. So does the loop over the layers of a network; but there each term is computed
from the sum so far, and the chain is a residual stream.
"""

from typing import Any, NamedTuple, TypeGuard

from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.primitives import ADDS, SCALES
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp.casting.sums._updates import may_hand_on

TERMS = 16
"""A sum of n equal terms that is rounded at each is off by sqrt(n / 3) times as much as
one that is rounded at the end. Of 16 terms that is 2.3; 3 is what autocast allows."""


class _Chain(NamedTuple):
    """A sum so far: how many terms, the bit of its last addition, and what made it."""

    terms: int
    bit: int
    eqn: Eqn
    before: "_Chain | None"


def unrolled_sums(jaxpr: Jaxpr) -> frozenset[int]:
    """The ids of the equations of a jaxpr that make sums of many terms."""
    if sum(eqn.primitive.name in ADDS for eqn in jaxpr.eqns) < TERMS:
        return frozenset()
    chains = _Chains()
    return _ids([chain for chain in map(chains.read, jaxpr.eqns) if _is_long(chain)])


class _Chains:
    """The sums of a jaxpr, while its equations are read in order."""

    def __init__(self):
        self.chains: dict[Any, _Chain] = {}
        # For each value the additions that it is computed from, as bits.
        self.sources: dict[Any, int] = {}
        self.bit = 1

    def read(self, eqn: Eqn) -> _Chain | None:
        """The sum that an equation adds to or moves, if it does."""
        operands = [v for v in eqn.invars if not is_literal(v)]
        source = 0
        for v in operands:
            source |= self.sources.get(v, 0)
        chain = self.chain(eqn, operands)
        if chain is not None:
            self.chains[eqn.outvars[0]] = chain
            if chain.bit == self.bit:
                source, self.bit = source | self.bit, self.bit << 1
        self.sources.update((v, source) for v in eqn.outvars)
        return chain

    def chain(self, eqn: Eqn, operands: list[Any]) -> _Chain | None:
        out = next(iter(eqn.outvars), None)
        if out is None or castable_dtype(out) is None:
            return None
        alike = [v for v in operands if v.aval.size == out.aval.size]
        sums = [self.chains[v] for v in alike if self.is_free(v, operands)]
        longest = max(sums, key=lambda chain: chain.terms, default=None)
        if eqn.primitive.name in ADDS:
            if longest is not None:
                return _Chain(longest.terms + 1, self.bit, eqn, longest)
            # A term that is computed from the sum starts anew.
            is_stream = any(v in self.chains for v in alike)
            return _Chain(0 if is_stream else 1, self.bit, eqn, None)
        is_passed = eqn.primitive.name in SCALES or may_hand_on(eqn)
        if longest is None or not is_passed:
            return None
        return _Chain(longest.terms, longest.bit, eqn, longest)

    def is_free(self, v: Any, operands: list[Any]) -> bool:
        """Whether a value is a sum from which nothing that it meets is computed."""
        if v not in self.chains:
            return False
        bit = self.chains[v].bit
        return not any(u is not v and self.sources.get(u, 0) & bit for u in operands)


def _is_long(chain: _Chain | None) -> TypeGuard[_Chain]:
    return chain is not None and chain.terms >= TERMS


def _ids(chains: list[_Chain]) -> frozenset[int]:
    found: set[int] = set()
    for last in reversed(chains):
        chain: _Chain | None = last
        while chain is not None and id(chain.eqn) not in found:
            found.add(id(chain.eqn))
            chain = chain.before
    return frozenset(found)
