"""The third stage of `compare`: the loss scales at which a backward pass fits a format.

The program runs in bfloat16 in place of the format. bfloat16 has the range of float32,
so nothing is lost before it is measured.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxmp import _tree
from jaxmp._jaxpr.primitives import LAYOUT
from jaxmp._jaxpr.types import Array, Arrays
from jaxmp.numerics.compare._candidates import Candidate
from jaxmp.numerics.ranges._formats import FormatRange, format_range
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program, read_scale
from jaxmp.numerics.replay._site import ReplaySite

# bfloat16 rounds the numbers otherwise than the format does.
_SPARE = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRange:
    """Powers of two to multiply a loss by, and what the format loses without.

    Attributes:
      largest: the largest at which nothing overflows; None if nothing was computed.
      smallest: the smallest at which nothing becomes zero or subnormal, which may be
        above `largest`: then every scale loses something.
      lost_unscaled: which fraction of the backward pass becomes zero at scale 1.
      lost_at_largest: and at `largest`.
      central: puts the median into the middle of the range, at the cost of the extremes
        if need be; at least 1.
    """

    largest: float | None = None
    smallest: float | None = None
    lost_unscaled: float = 0.0
    lost_at_largest: float = 0.0
    central: float = 1.0

    @property
    def suggested(self) -> float:
        """The smallest that loses nothing, at most `largest`, at least 1."""
        if self.largest is None or self.smallest is None:
            return 1.0
        return max(1.0, min(self.largest, self.smallest))


class Scales(NamedTuple):
    """Loss scales for the backward pass under a policy.

    Attributes:
      chosen: the one to compute gradients at; None without gradients.
      range: those that fit; None for a format with the range of float32.
    """

    chosen: float | None
    range: ScaleRange | None


def find_scales(candidate: Candidate, loss_scale: Any) -> Scales:
    """Chooses a loss scale for a policy, unless one is given."""
    if candidate.backward.loss_scale is None:
        return Scales(None, None)
    found = None
    if candidate.range is not None:
        found = scale_range([candidate.range], candidate.dtype)
    if loss_scale is not None:
        return Scales(read_scale(loss_scale), found)
    return Scales(1.0 if found is None else found.suggested, found)


def scale_range(programs: Iterable[Program], dtype: DTypeLike) -> ScaleRange:
    """Fits the numbers of a backward pass, at loss scale 1, into a format.

    Args:
      programs: the function and its gradient under the `stand_in` of the policy, for
        one or more batches.
      dtype: the format.
    """
    found = _BackwardRange()
    for program in programs:
        found.run_program(program)
    if not found.amax:
        return ScaleRange()
    limits = format_range(dtype)
    high = math.ceil(math.log2(limits.overflows / (found.amax * _SPARE))) - 1
    low = math.ceil(math.log2(limits.becomes_normal / found.smallest))
    return ScaleRange(
        largest=2.0**high,
        smallest=2.0**low,
        lost_unscaled=found.lost(limits, 0),
        lost_at_largest=found.lost(limits, high),
        central=2.0 ** max(_middle(limits) - found.median(), 0),
    )


def _middle(limits: FormatRange) -> int:
    exponents = map(math.log2, (limits.largest, limits.smallest_subnormal))
    return round(sum(exponents) / 2)


class _BackwardRange(Interpreter):
    """The exponents of what a backward pass computes in half.

    Attributes:
      exponents: how many numbers there were from 2^e up to 2^(e+1), by e.
      amax, smallest: the largest and the smallest magnitude that is not zero.
    """

    def __init__(self):
        super().__init__()
        self.exponents = collections.Counter[int]()
        self.amax, self.smallest = 0.0, float("inf")

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        if site.is_backward and site.primitive not in LAYOUT:
            for x in filter(_tree.is_half, results):
                self._add(x)

    def _add(self, x: Array) -> None:
        wide = np.abs(np.asarray(x).astype(np.float64))
        wide = wide[np.isfinite(wide) & (wide > 0)]
        if wide.size:
            self.amax = max(self.amax, float(wide.max()))
            self.smallest = min(self.smallest, float(wide.min()))
            exponents, counts = np.unique(np.frexp(wide)[1] - 1, return_counts=True)
            pairs = zip(exponents.tolist(), counts.tolist(), strict=True)
            self.exponents.update(dict(pairs))

    def median(self) -> int:
        """The exponent of the median."""
        counts = sorted(self.exponents.items())
        totals = itertools.accumulate(count for _, count in counts)
        half = self.exponents.total() / 2
        return next(e for (e, _), n in zip(counts, totals, strict=True) if n >= half)

    def lost(self, limits: FormatRange, scale_exponent: int) -> float:
        """Which fraction of the numbers becomes zero at a loss scale."""
        border = math.log2(limits.becomes_zero) - scale_exponent
        lost = sum(n for e, n in self.exponents.items() if e < border)
        return lost / self.exponents.total()
