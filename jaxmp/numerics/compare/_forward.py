"""The second stage of `compare`: each activation under a policy, and its distance.

Autocast keeps names and source lines, so the primitive, path, call, shape and iteration
of an operation identify it, with its number among those that share all of them.
Where their count differs, autocast has rewritten the place, and nothing is compared.
A quantised matmul is compared with the matmul in its place.
"""

import collections
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxmp import _tree
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.types import Array, Arrays
from jaxmp.numerics.compare._candidates import Candidate
from jaxmp.numerics.compare._distance import Distance
from jaxmp.numerics.compare._quantized import Measuring, QuantizedMatmuls
from jaxmp.numerics.compare._reference import Key, Reference, is_activation, key_of
from jaxmp.numerics.compare.rows import ActivationRow, tolerable
from jaxmp.numerics.replay._site import ReplaySite


class Forward(NamedTuple):
    """What a policy does to the function itself.

    Attributes:
      rows: one for each activation.
      output_error: relative error of the outputs, all of them together.
      matmuls: the quantised matmuls, measured.
    """

    rows: list[ActivationRow]
    output_error: float
    matmuls: QuantizedMatmuls


def compare_forward(candidate: Candidate, exact: Reference) -> Forward:
    """Runs the function under a policy, and compares what it computes."""
    run = _Comparing(exact)
    outs = run.run_program(candidate.forward)
    outputs = Distance()
    for wanted, given in zip(exact.outputs, outs, strict=True):
        if _tree.is_inexact(wanted):
            outputs.add(wanted, given)
    limit = tolerable(run.matmuls)
    rows = [
        ActivationRow(
            policy=candidate.policy,
            limit=limit,
            **site.described(),
            order=order,
            dtype=found.dtype,
            **found.distance.figures(),
        )
        for order, (site, found) in enumerate(run.totals().items())
    ]
    return Forward(rows, outputs.relative_error, run.matmuls)


class _Measured(NamedTuple):
    """The distance of an activation, and the dtype that it has under the policy."""

    distance: Distance
    dtype: str


class _Comparing(Measuring):
    """Measures how far every activation is from the reference."""

    def __init__(self, exact: Reference):
        super().__init__()
        self.wanted = exact.activations
        self._met: dict[Key, list[_Measured]] = collections.defaultdict(list)
        self._handed: dict[int, tuple[Any, Key, int]] = {}

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        super().observe(site, operands, results)
        if site.primitive == CAST:
            self._hand_back(operands[0], results[0])
        elif is_activation(site, results):
            key = key_of(site, results[0], self.iterations)
            number = len(self._met[key])
            self._met[key].append(self._measure(key, number, results[0]))
            ref = weakref.ref(results[0])
            self._handed[id(results[0])] = ref, key, number

    def _hand_back(self, operand: Array, result: Array) -> None:
        """A result that is cast to half at once is what the operation returns."""
        ref, key, number = self._handed.get(id(operand), (lambda: None, (), 0))
        if ref() is operand and _tree.is_inexact(result):
            self._met[key][number] = self._measure(key, number, result)

    def _measure(self, key: Key, number: int, value: Array) -> _Measured:
        distance = Distance()
        wanted = self.wanted.get(key, ())
        if number < len(wanted):
            distance.add(wanted[number][1], value)
        return _Measured(distance, str(value.dtype))

    def totals(self) -> dict[ReplaySite, _Measured]:
        """What each operation of the reference amounts to, over all iterations."""
        found: dict[ReplaySite, _Measured] = {}
        for site, measured in self._matched():
            distance = found.setdefault(site, _Measured(Distance(), measured.dtype))[0]
            distance += measured.distance
        return found

    def _matched(self) -> Iterator[tuple[ReplaySite, _Measured]]:
        for key, wanted in self.wanted.items():
            met = self._met.get(key, ())
            if len(met) == len(wanted):
                yield from zip((site for site, _ in wanted), met, strict=True)
