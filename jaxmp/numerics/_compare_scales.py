"""The loss scales at which a backward pass fits into a format."""

import dataclasses
import math
from typing import Any

from jaxmp.numerics._compare_runs import BackwardRange
from jaxmp.numerics._formats import format_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRange:
    """Powers of two to multiply a loss by, and what the format loses without.

    Attributes:
      largest: the largest at which nothing overflows; None if nothing was computed.
      smallest: the smallest at which nothing becomes zero or subnormal, which may be
        above `largest`: then every scale loses something.
      lost_unscaled: which fraction of the backward pass becomes zero at scale 1.
      lost_at_largest: and at `largest`.
    """

    largest: float | None
    smallest: float | None
    lost_unscaled: float
    lost_at_largest: float

    @property
    def suggested(self) -> float:
        """The smallest that loses nothing, at least 1 and at most `largest`."""
        if self.largest is None or self.smallest is None:
            return 1.0
        return min(self.largest, max(self.smallest, 1.0))


def scale_range(found: BackwardRange, dtype: Any) -> ScaleRange:
    """Fits the numbers of a backward pass, at loss scale 1, into a format.

    Args:
      found: these numbers, in a format with the range of float32.
      dtype: the format.
    """
    if not found.amax:
        return ScaleRange(
            largest=None, smallest=None, lost_unscaled=0.0, lost_at_largest=0.0
        )
    limits = format_range(dtype)
    high = math.ceil(math.log2(limits.overflows / (found.amax * _SPARE))) - 1
    low = math.ceil(math.log2(limits.becomes_normal / found.smallest))
    return ScaleRange(
        largest=2.0**high,
        smallest=2.0**low,
        lost_unscaled=_lost(found, limits.becomes_zero, 0),
        lost_at_largest=_lost(found, limits.becomes_zero, high),
    )


# The numbers were rounded in another format than the one that is asked about.
_SPARE = 1.05


def _lost(found: BackwardRange, becomes_zero: float, exponent: int) -> float:
    border = math.log2(becomes_zero) - exponent
    lost = sum(n for e, n in found.exponents.items() if e < border)
    return lost / found.exponents.total()
