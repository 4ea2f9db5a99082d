"""`LeafReport`: what a dtype does to the gradients of one parameter."""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxmp.numerics.monitor._measurement import Measurement
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.ranges._statistics import EXPONENTS, Statistics

COLUMNS = (
    *("parameter", "size", "gradient max", "mean", "zero", "underflow"),
    *("overflow", "update/weight", "lost", "non-finite"),
)


class LeafReport(NamedTuple):
    """One parameter in a `MonitorReport`; shares are of its elements, from 0 to 1."""

    path: str
    size: int
    gradient_amax: float
    """The largest magnitude of a gradient."""
    gradient_mean: float
    """The mean magnitude of its gradients."""
    zero: float
    """Gradients that are zero."""
    underflow: float
    """Gradients that become zero in the dtype, multiplied by the loss scale."""
    subnormal: float
    """Gradients that lose digits in it."""
    overflow: float
    """Gradients that become infinite in it."""
    update_ratio: float
    """Mean magnitude of the updates over mean magnitude of the parameters."""
    lost: float
    """Updates that are not zero and yet leave their parameter as it was."""
    nonfinite: int
    """Gradients that were not finite in the last step that had any."""

    @property
    def badness(self) -> tuple[float, ...]:
        """What rows are sorted by: the larger, the worse."""
        lost = self.underflow + self.lost
        return (self.overflow > 0, lost, self.zero, self.subnormal)

    def cells(self) -> list[str]:
        """The row as text, under `COLUMNS`."""
        return [
            *(self.path, f"{self.size:,}", f"{self.gradient_amax:.1e}"),
            *(f"{self.gradient_mean:.1e}", f"{self.zero:.1%}", f"{self.underflow:.1%}"),
            *(f"{self.overflow:.1%}", f"{self.update_ratio:.1e}", f"{self.lost:.1%}"),
            str(self.nonfinite),
        ]


def leaf_report(
    path: str, found: Measurement, dtype: DTypeLike, loss_scale: float
) -> LeafReport:
    """Reads what was measured of one parameter.

    Args:
      path: of the parameter.
      found: what was measured, in NumPy.
      dtype: in which underflow and overflow are counted.
      loss_scale: by which gradients are multiplied for that.
    """
    grads, params = found.gradients[path], found.params[path]
    return LeafReport(
        path=path,
        size=int(params.size),
        gradient_amax=float(grads.amax),
        gradient_mean=float(grads.mean),
        zero=float(grads.zeros) / max(int(grads.size), 1),
        **_exponent_shares(grads, dtype, loss_scale),
        update_ratio=float(found.update_ratios[path]),
        lost=float(found.lost_updates[path]) / max(int(params.size), 1),
        nonfinite=int(found.nonfinite[path]),
    )


def _exponent_shares(
    statistics: Statistics, dtype: DTypeLike, loss_scale: float
) -> dict[str, float]:
    """The shares that a dtype would lose of numbers times a scale, by their exponents.

    Returns:
      `underflow`, `subnormal` and `overflow`.
    """
    info = format_range(dtype)
    size = max(int(statistics.size), 1)
    counts = np.asarray(statistics.exponents) / size
    exponents = np.array(EXPONENTS) + math.log2(loss_scale)
    becomes_zero, normal = math.log2(info.becomes_zero), math.log2(info.smallest_normal)
    is_lost = exponents < becomes_zero
    return {
        "underflow": float(counts[is_lost].sum()),
        "subnormal": float(counts[~is_lost & (exponents < normal)].sum()),
        "overflow": float(counts[2.0**exponents > info.largest].sum()),
    }
