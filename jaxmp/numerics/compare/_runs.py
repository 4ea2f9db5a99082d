"""The runs behind `compare`: one that is remembered, and others held against it.

    reference   fn as it is, float arguments widened  ->  every activation is kept
    policy      autocast(fn, policy)                  ->  matched with these, operation
                                                          by operation

Autocast keeps names and source lines, so an operation is found again by its primitive,
path, line and iteration, and by its number among those that share all four. Where these
numbers differ, autocast has written the place anew, and nothing is compared.

A format without arithmetic, such as float8, is emulated: the function runs under
bfloat16, which has the range of float32, and every bfloat16 result is rounded to the
format. That is a cast: `lax.reduce_precision` turns subnormal numbers into zero. Being
rounded twice, such results are some per cent farther off than with one rounding.
"""

import collections
import weakref
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._jaxpr.execution import bind
from jaxmp._jaxpr.primitives import CAST, LAYOUT
from jaxmp.numerics.compare._distance import Distance
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._site import ReplaySite

Key = tuple[Any, ...]


class Reference(Interpreter):
    """Remembers every activation."""

    def __init__(self):
        super().__init__()
        self.found: dict[Key, list[tuple[ReplaySite, Any]]] = collections.defaultdict(
            list
        )

    def observe(self, site, operands, results):
        if _is_compared(site, results):
            self.found[_key(site, self.iterations)].append((site, results[0]))


class Rounding(Interpreter):
    """Rounds every bfloat16 result to a format, if one is given."""

    def __init__(self, emulated: Any = None):
        super().__init__()
        self.emulated = emulated

    def equation(self, site, operands):
        results = bind(site.eqn, operands)
        if self.emulated is not None:
            results = [_round(x, self.emulated) for x in results]
        self.observe(site, operands, results)
        return results


class Comparing(Rounding):
    """Measures how far every activation is from that of the reference."""

    def __init__(self, reference: Reference, emulated: Any = None):
        super().__init__(emulated)
        self.reference = reference
        self._met: dict[Key, list[tuple[Distance, str]]] = collections.defaultdict(list)
        self._handed: dict[int, tuple[Any, Key, int]] = {}

    def observe(self, site, operands, results):
        if site.primitive == CAST:
            self._hand_back(operands[0], results[0])
        elif _is_compared(site, results):
            key = _key(site, self.iterations)
            number = len(self._met[key])
            self._met[key].append(self._measure(key, number, results[0]))
            ref = weakref.ref(results[0])
            self._handed[id(results[0])] = ref, key, number

    def _hand_back(self, operand: Any, result: Any) -> None:
        """A result that is cast to half at once is what the operation returns."""
        ref, key, number = self._handed.get(id(operand), (lambda: None, (), 0))
        if ref() is operand and _tree.is_inexact(result):
            self._met[key][number] = self._measure(key, number, result)

    def _measure(self, key: Key, number: int, value: Any) -> tuple[Distance, str]:
        distance = Distance()
        wanted = self.reference.found.get(key, ())
        if number < len(wanted) and wanted[number][1].shape == value.shape:
            distance.add(wanted[number][1], value)
        half = self.emulated if value.dtype == jnp.bfloat16 else None
        return distance, str(jnp.dtype(half or value.dtype))

    def distances(self) -> dict[ReplaySite, tuple[Distance, str]]:
        """The distance of each operation of the reference, and the dtype it had."""
        found: dict[ReplaySite, tuple[Distance, str]] = {}
        for key, wanted in self.reference.found.items():
            met = self._met.get(key, ())
            if len(met) != len(wanted):
                continue
            for (site, _), (distance, dtype) in zip(wanted, met, strict=True):
                total, _ = found.setdefault(site, (Distance(), dtype))
                total += distance
        return found


def _is_compared(site: ReplaySite, results: Sequence[Any]) -> bool:
    is_floating = bool(results) and _tree.is_inexact(results[0])
    return is_floating and site.primitive not in (*LAYOUT, CAST)


def _key(site: ReplaySite, iterations: tuple[int, ...]) -> Key:
    return site.primitive, site.path, site.line, iterations


def _round(x: Any, dtype: Any) -> Any:
    is_half = _tree.is_array(x) and x.dtype == jnp.bfloat16
    return x.astype(dtype).astype(jnp.bfloat16) if is_half else x
