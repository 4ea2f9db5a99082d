"""Finds sums that are written term by term, without a loop.

A Python loop over time leaves a chain of additions, each to the result of the one
before. So does the loop over the layers of a network; but there each term is computed
from the sum so far, and the chain is a residual stream.
"""

from typing import Any, NamedTuple

from jaxmp.casting import _registry
from jaxmp.casting._states import castable_dtype, is_literal

TERMS = 16
"""A sum of n equal terms that is rounded at each is off by sqrt(n / 3) times as much as
one that is rounded at the end. Of 16 terms that is 2.3; 3 is what autocast allows."""

_ADDS = frozenset(("add", "add_any", "sub"))
_SCALES = frozenset(("mul", "div", "neg", "select_n", "convert_element_type"))


class _Chain(NamedTuple):
    """A sum so far: how many terms, the bit of its last addition, and what made it."""

    terms: int
    bit: int
    eqn: Any
    before: "_Chain | None"


def unrolled_sums(jaxpr: Any) -> frozenset[int]:
    """The ids of the equations of a jaxpr that make sums of many terms."""
    count = sum(eqn.primitive.name in _ADDS for eqn in jaxpr.eqns)
    if count < TERMS:
        return frozenset()
    chains: dict[Any, _Chain] = {}
    # For each value the additions that it is computed from, as bits.
    sources: dict[Any, int] = {}
    long: list[_Chain] = []
    bit = 1
    for eqn in jaxpr.eqns:
        operands = [v for v in eqn.invars if not is_literal(v)]
        read = 0
        for v in operands:
            read |= sources.get(v, 0)
        chain = _chain(eqn, operands, chains, sources, bit)
        if chain is not None:
            chains[eqn.outvars[0]] = chain
            if chain.bit == bit:
                read, bit = read | bit, bit << 1
            if chain.terms >= TERMS:
                long.append(chain)
        sources.update((v, read) for v in eqn.outvars)
    return _ids(long)


def _chain(
    eqn: Any,
    operands: list[Any],
    chains: dict[Any, _Chain],
    sources: dict[Any, int],
    bit: int,
) -> _Chain | None:
    """The sum that an equation makes or moves, if it does."""
    name, out = eqn.primitive.name, next(iter(eqn.outvars), None)
    if out is None or castable_dtype(out) is None:
        return None
    alike = [v for v in operands if v.aval.size == out.aval.size]
    if name in _ADDS:
        return _added(eqn, alike, chains, sources, bit)
    if name in _SCALES or name in _registry.LAYOUT:
        for v in alike:
            chain = chains.get(v)
            if chain is not None and not _reads(chain, v, operands, sources):
                return _Chain(chain.terms, chain.bit, eqn, chain)
    return None


def _added(
    eqn: Any,
    operands: list[Any],
    chains: dict[Any, _Chain],
    sources: dict[Any, int],
    bit: int,
) -> _Chain:
    """The longest sum that gets a term; a term that is computed from it starts anew."""
    found = [chains[v] for v in operands if v in chains]
    free = [
        chains[v]
        for v in operands
        if v in chains and not _reads(chains[v], v, operands, sources)
    ]
    longest = max(free, key=lambda chain: chain.terms, default=None)
    if longest is None:
        return _Chain(0 if found else 1, bit, eqn, None)
    return _Chain(longest.terms + 1, bit, eqn, longest)


def _reads(chain: _Chain, old: Any, operands: list[Any], sources: dict[Any, int]):
    """Whether what meets a sum in an equation is computed from the sum."""
    return any(v is not old and sources.get(v, 0) & chain.bit for v in operands)


def _ids(chains: list[_Chain]) -> frozenset[int]:
    found: set[int] = set()
    for last in reversed(chains):
        chain: _Chain | None = last
        while chain is not None and id(chain.eqn) not in found:
            found.add(id(chain.eqn))
            chain = chain.before
    return frozenset(found)
