"""The loss scales at which a backward pass fits into a format.

The numbers are those of the same program with bfloat16 in place of the format: it has
the range of float32, so that nothing is lost before it is looked at.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.primitives import LAYOUT
from jaxmp.numerics._formats import FormatRange, format_range
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program
from jaxmp.policy import Policy

_LARGE_RANGE = 1e30
# The numbers were rounded in another format than the one that is asked about.
_SPARE = 1.05


def needs_scale(dtype: Any) -> bool:
    """Whether a format's range is so small that gradients do not fit by themselves."""
    return format_range(dtype).largest < _LARGE_RANGE


def stand_in(policy: Policy) -> Policy:
    """The policy with bfloat16 for its compute dtype."""
    return Policy(
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
        matmul_precision=policy.matmul_precision,
    )


def stand_in_rules(rules: Sequence[Any]) -> list[Any]:
    """Rules of autocast with bfloat16 for every half dtype."""
    return [
        dataclasses.replace(rule, compute=jnp.bfloat16)
        if getattr(rule, "compute", None) in _tree.HALF
        else rule
        for rule in rules
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRange:
    """Powers of two to multiply a loss by, and what the format loses without.

    Attributes:
      largest: the largest at which nothing overflows; None if nothing was computed.
      smallest: the smallest at which nothing becomes zero or subnormal, which may be
        above `largest`: then every scale loses something.
      lost_unscaled: which fraction of the backward pass becomes zero at scale 1.
      lost_at_largest: and at `largest`.
      central: puts the median into the middle of the range, whatever becomes of the
        extremes; at least 1.
    """

    largest: float | None
    smallest: float | None
    lost_unscaled: float
    lost_at_largest: float
    central: float

    @property
    def suggested(self) -> float:
        """The smallest that loses nothing, at most `largest`, at least 1."""
        if self.largest is None or self.smallest is None:
            return 1.0
        return max(1.0, min(self.largest, self.smallest))


def scale_range(programs: Iterable[Program], dtype: Any) -> ScaleRange:
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
        return ScaleRange(
            largest=None,
            smallest=None,
            lost_unscaled=0.0,
            lost_at_largest=0.0,
            central=1.0,
        )
    limits = format_range(dtype)
    high = math.ceil(math.log2(limits.overflows / (found.amax * _SPARE))) - 1
    low = math.ceil(math.log2(limits.becomes_normal / found.smallest))
    return ScaleRange(
        largest=2.0**high,
        smallest=2.0**low,
        lost_unscaled=_lost(found, limits.becomes_zero, 0),
        lost_at_largest=_lost(found, limits.becomes_zero, high),
        central=2.0 ** max(_middle(limits) - _median(found.exponents), 0),
    )


def _middle(limits: FormatRange) -> int:
    exponents = map(math.log2, (limits.largest, limits.smallest_subnormal))
    return round(sum(exponents) / 2)


def _median(exponents: collections.Counter[int]) -> int:
    counts = sorted(exponents.items())
    totals = itertools.accumulate(count for _, count in counts)
    half = exponents.total() / 2
    return next(e for (e, _), n in zip(counts, totals, strict=True) if n >= half)


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

    def observe(self, site, operands, results):
        if site.is_backward and site.primitive not in LAYOUT:
            for x in results:
                if _tree.is_half(x):
                    self._add(x)

    def _add(self, x: Any) -> None:
        wide = np.abs(np.asarray(x).astype(np.float64))
        wide = wide[np.isfinite(wide) & (wide > 0)]
        if wide.size:
            self.amax = max(self.amax, float(wide.max()))
            self.smallest = min(self.smallest, float(wide.min()))
            exponents, counts = np.unique(np.frexp(wide)[1] - 1, return_counts=True)
            self.exponents.update(
                dict(zip(exponents.tolist(), counts.tolist(), strict=True))
            )


def _lost(found: _BackwardRange, becomes_zero: float, exponent: int) -> float:
    border = math.log2(becomes_zero) - exponent
    lost = sum(n for e, n in found.exponents.items() if e < border)
    return lost / found.exponents.total()
