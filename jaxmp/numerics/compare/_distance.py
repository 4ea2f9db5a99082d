"""`Distance`: how far numbers are from a reference, summed up over arrays."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.types import Array

NEGLIGIBLE = 0.01
"""A gradient this small relative to the others is zero but for rounding, as for a bias
before a norm or an attention's keys. Its error is relative to theirs."""


@dataclasses.dataclass
class Distance:
    """Sums over pairs of arrays, in float64 on the host.

    Numbers that are not finite in the reference are left out, and so is the largest of
    its dtype, which masks are made of.

    Attributes:
      size: how many numbers were compared.
      wanted, given, error: sums of the squares of the reference, of what came out, and
        of the difference.
      product: sum of the products of the reference and what came out.
      least: what errors are relative to if `wanted` is less.
      nonfinite: how many came out infinite or NaN.
      nonzero, zeroed: how many are not zero in the reference; how many of these came
        out as zero.
    """

    size: int = 0
    wanted: float = 0.0
    given: float = 0.0
    error: float = 0.0
    product: float = 0.0
    least: float = 0.0
    nonfinite: int = 0
    nonzero: int = 0
    zeroed: int = 0

    def add(self, reference: Array, value: Array, scale: float = 1.0) -> None:
        """Adds a pair of arrays of one shape; `value` is divided by `scale`."""
        wide = np.complex128 if jnp.iscomplexobj(reference) else np.float64
        wanted, given = (np.asarray(x).astype(wide) for x in (reference, value))
        largest = float(jnp.finfo(reference.dtype).max)
        counts = np.isfinite(wanted) & (np.abs(wanted) != largest)
        if not counts.all():
            wanted, given = wanted[counts], given[counts]
        given = given / scale
        self.size += wanted.size
        self.nonzero += int(np.count_nonzero(wanted))
        finite = np.isfinite(given)
        if not finite.all():
            self.nonfinite += int(wanted.size - finite.sum())
            wanted, given = wanted[finite], given[finite]
        self.wanted += _square(wanted)
        self.given += _square(given)
        self.error += _square(given - wanted)
        self.product += float(np.vdot(wanted, given).real)
        self.zeroed += int(np.count_nonzero((given == 0) & (wanted != 0)))

    def __iadd__(self, other: "Distance") -> "Distance":
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def relative_error(self) -> float:
        """Norm of the difference over norm of the reference."""
        if self.nonfinite:
            return math.inf
        if not self.error:
            return 0.0
        size = max(self.wanted, self.least)
        return math.sqrt(self.error / size) if size else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; NaN if one of them is zero."""
        if self.nonfinite or not self.wanted or not self.given:
            return math.nan
        return self.product / math.sqrt(self.wanted) / math.sqrt(self.given)

    @property
    def snr(self) -> float:
        """Power of the reference over power of the difference, in decibels."""
        error = self.relative_error
        if error == 0:
            return math.inf
        return -math.inf if error == math.inf else -20 * math.log10(error)

    @property
    def underflow(self) -> float:
        """Which fraction of what is not zero came out as zero."""
        return self.zeroed / max(self.nonzero, 1)

    def figures(self) -> dict[str, Any]:
        """The figures that a row of a `Comparison` shows."""
        return {
            "relative_error": self.relative_error,
            "cosine": self.cosine,
            "snr": self.snr,
            "zeroed": self.underflow,
            "nonfinite": self.nonfinite,
            "size": self.size,
        }


def _square(x: np.ndarray) -> float:
    return float(np.vdot(x, x).real)


def distances(
    exact: Mapping[str, Array], given: Mapping[str, Array], scale: float = 1.0
) -> dict[str, Distance]:
    """The distance of each gradient, those that are zero but for rounding included.

    Args:
      exact: the reference, by parameter.
      given: what is compared with it, multiplied by `scale`.
    """
    found = {name: Distance() for name in exact}
    for name, distance in found.items():
        distance.add(exact[name], given[name], scale)
    size = sum(x.size for x in found.values())
    typical = sum(x.wanted for x in found.values()) / max(size, 1)
    for distance in found.values():
        distance.least = NEGLIGIBLE**2 * typical * distance.size
    return found
