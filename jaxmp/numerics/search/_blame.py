"""Which units lose how much under a policy, from one run of each batch.

Each operation that the policy has in half runs twice on the same float32 operands: as
it is, and with operands and result rounded to half. The relative distance of the two is
the error that the operation adds by itself: infinite for an overflow, large for a
difference of nearly equal numbers. Quantised matmuls are measured where they are
carried out, in a run under the policy.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.execution import bind
from jaxmp._jaxpr.primitives import CAST
from jaxmp._jaxpr.types import Array, Arrays, Eqn
from jaxmp.casting import OpRule
from jaxmp.numerics.compare._distance import Distance
from jaxmp.numerics.compare._quantized import (
    Measuring,
    QuantizedMatmuls,
    formats,
)
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.numerics.search._half_operations import Key, key_of
from jaxmp.numerics.search._units import Unit, matmul_units_of
from jaxmp.policy import PolicyRule


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays in float32, or in half, or is a candidate for it, and why.

    Attributes:
      name: path of a layer, or an operation and where it is.
      rule: a `PolicyRule` for a layer, an `OpRule` for an operation.
      error: relative error that it adds by itself if it does not stay; infinite for an
        overflow.
      reason: the operation that does, its line and what happens to it.
      stays_in: `"float32"`; `"half"` for matmuls that are not to be quantised.
    """

    name: str
    rule: PolicyRule | OpRule
    error: float
    reason: str
    stays_in: str = "float32"


def rank_by_blame(
    programs: Iterable[Program],
    half: Mapping[Key, bool],
    units: Mapping[Key, Unit],
    dtype: np.dtype,
) -> dict[Unit, Kept]:
    """Ranks units by the error that they add, the worst first.

    Args:
      programs: the function with its gradient in float32, one for each batch.
      half: the operations that are in half, and whether their operands are as well.
      units: the unit of each.
      dtype: the half dtype.
    """
    worst = {unit: Kept(unit.name, unit.rule, 0.0, "") for unit in units.values()}
    for program in programs:
        run = _Twice(half, dtype)
        run.run_program(program)
        for site, found in run.found.items():
            unit = units.get(key_of(site))
            error = found.distance.relative_error
            if unit is not None and error > worst[unit].error:
                worst[unit] = Kept(unit.name, unit.rule, error, found.reason(dtype))
    # Sorting is stable: equals stay in the order of execution.
    return dict(sorted(worst.items(), key=lambda item: -item[1].error))


def measure_quantized(programs: Sequence[Program]) -> list[QuantizedMatmuls]:
    """Measures the quantised matmuls of programs, one for each batch."""
    runs = [Measuring() for _ in programs]
    for run, program in zip(runs, programs, strict=True):
        run.run_program(program)
    return [run.matmuls for run in runs]


def rank_quantized(batches: Iterable[QuantizedMatmuls]) -> dict[Unit, Kept]:
    """Ranks units that keep quantised matmuls in half, the worst first.

    Args:
      batches: the quantised matmuls, backward included, as they were measured.
    """
    found: dict[Key, tuple[ReplaySite, Distance]] = {}
    for matmuls in batches:
        for site, distance in matmuls.found.items():
            key = key_of(site)._replace(primitive="dot_general")
            if key not in found or _is_worse(distance, found[key][1]):
                found[key] = site, distance
    units = matmul_units_of(found)
    worst = {
        unit: Kept(unit.name, unit.rule, 0.0, "", "half") for unit in units.values()
    }
    for key, unit in units.items():
        site, distance = found[key]
        error = distance.relative_error
        if error > worst[unit].error or not worst[unit].reason:
            reason = f"{_name(site)} in {formats(site.eqn)} is off by {error:.2%}"
            worst[unit] = dataclasses.replace(worst[unit], error=error, reason=reason)
    return dict(sorted(worst.items(), key=lambda item: -item[1].error))


def _is_worse(distance: Distance, other: Distance) -> bool:
    return distance.relative_error > other.relative_error


def _name(site: ReplaySite) -> str:
    """An operation, its line, and whether it is part of the backward pass."""
    way = " in the backward pass" if site.is_backward else ""
    where = f" at {site.line}" if site.line is not None else ""
    return f"{site.primitive}{where}{way}"


class _Twice(Interpreter):
    """Carries out operations in float32, and on the side in half."""

    def __init__(self, half: Mapping[Key, bool], dtype: np.dtype):
        super().__init__()
        self.half = half
        self.dtype = dtype
        self.found: dict[ReplaySite, _Found] = {}

    def equation(self, site: ReplaySite, operands: Arrays) -> list[Array]:
        results = bind(site.eqn, operands)
        key = key_of(site)
        if key in self.half and site.primitive != CAST and not site.eqn.effects:
            given = results
            if self.half[key]:
                given = _in_half(site.eqn, operands, self.dtype)
            self._compare(site, results, given)
        return results

    def _compare(self, site: ReplaySite, results: Arrays, given: Arrays) -> None:
        found = self.found.setdefault(site, _Found(site))
        for wanted, x in zip(results, given, strict=True):
            if _tree.is_castable(wanted):
                rounded = x.astype(self.dtype)
                found.distance.add(wanted, rounded)
                finite = np.abs(np.asarray(wanted, np.float64))
                finite = finite[np.isfinite(finite)]
                found.amax = max(found.amax, finite.max(initial=0.0))


@dataclasses.dataclass
class _Found:
    """What one operation lost, over all iterations."""

    site: ReplaySite
    distance: Distance = dataclasses.field(default_factory=Distance)
    amax: float = 0.0

    def reason(self, dtype: np.dtype) -> str:
        name = _name(self.site)
        limits = format_range(dtype)
        if self.distance.nonfinite and self.amax > limits.overflows:
            return (
                f"{name} reaches {self.amax:.3g}, and {limits.name} ends at "
                f"{limits.largest:.5g}"
            )
        if self.distance.nonfinite:
            return f"an operand of {name} overflows {limits.name}"
        if self.distance.underflow > _MANY:
            return f"{self.distance.underflow:.0%} of {name} become zero"
        return f"{name} is off by {self.distance.relative_error:.2%}"


_MANY = 0.01


def _in_half(eqn: Eqn, operands: Arrays, dtype: np.dtype) -> list[Array]:
    """An operation on operands that are rounded to half."""
    half = [x.astype(dtype) if _tree.is_castable(x) else x for x in operands]
    if eqn.params.get("preferred_element_type") == jnp.float32:
        # CPUs multiply half to half, but not all of it to float32.
        params = {**eqn.params, "preferred_element_type": dtype}
        eqn = eqn.replace(params=params)
    try:
        return bind(eqn, half)
    except (TypeError, ValueError):
        # Some parameters name the dtypes that an operation was traced with.
        pairs = zip(half, operands, strict=True)
        return bind(eqn, [h if h is x else h.astype(x.dtype) for h, x in pairs])
