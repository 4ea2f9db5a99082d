"""`Meter`: measures the results of every operation, in the dtype that they have.

The question is a "what if": which numbers would be zero, subnormal or infinite in
another dtype. Operations that only move numbers (`reshape`, `broadcast_in_dim`, ...)
are left out, and so are those whose results are not floating numbers.

What is rounded to float8 or int8 for a matmul is no "what if": of a `quantize`, the
array before it is measured, and counted is what became zero, or subnormal, under its
scale.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.matmuls import QUANTIZE
from jaxmp._jaxpr.primitives import CAST, LAYOUT
from jaxmp._jaxpr.types import Array, Arrays
from jaxmp.numerics.compare._distance import Distance
from jaxmp.numerics.ranges._finiteness import nonfinite
from jaxmp.numerics.ranges._statistics import statistics
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.numerics.trace._result import TraceRow
from jaxmp.quantization.scales import Quantized

_COUNTS = ("size", "zeros", "underflows", "subnormals", "overflows", "nonfinite")
_LARGE = 2**20


class Meter(Interpreter):
    """Sums up the results of every operation.

    Args:
      dtype: name of the dtype in which underflow and overflow are counted.
    """

    def __init__(self, dtype: str):
        super().__init__()
        self.dtype = dtype
        self._totals: dict[ReplaySite, _Total] = {}

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        if site.primitive == QUANTIZE:
            self._add_quantized(site, operands[-1], Quantized(*results))
            return
        results = [x for x in results if _tree.is_inexact(x)]
        if site.primitive in LAYOUT or not results:
            return
        if site not in self._totals:
            lost = _lost_integers(site, operands, self.dtype)
            self._totals[site] = _Total(len(self._totals), results[0].dtype, lost)
        total = self._totals[site]
        total.times += 1
        for x in results:
            total.add(*_measure(x, self.dtype))
        if any(nonfinite(results)) and not any(nonfinite(operands)):
            total.made_nonfinite += 1

    def _add_quantized(
        self, site: ReplaySite, array: Array, quantized: Quantized
    ) -> None:
        if site not in self._totals:
            dtype = quantized.values.dtype
            self._totals[site] = _Total(len(self._totals), dtype, 0.0)
        total = self._totals[site]
        total.times += 1
        total.add(*_measure_quantized(array, quantized))
        total.rounding = total.rounding or Distance()
        total.rounding.add(array, quantized.in_dtype(jnp.float32))

    def rows(self) -> Iterator[TraceRow]:
        """What was measured, in the order of execution."""
        return (total.row(site) for site, total in self._totals.items())


@dataclasses.dataclass
class _Total:
    """The results of one operation, summed up."""

    order: int
    dtype: Any
    lost_integers: float
    times: int = 0
    made_nonfinite: int = 0
    amax: float = 0.0
    smallest: float = float("inf")
    sum: float = 0.0
    counts: Any = 0
    rounding: Distance | None = None

    def add(self, ranges: np.ndarray, counts: np.ndarray) -> None:
        amax, smallest, total = map(float, ranges)
        self.amax = max(self.amax, amax)
        self.smallest = min(self.smallest, smallest or float("inf"))
        self.sum += total
        self.counts = self.counts + counts

    def row(self, site: ReplaySite) -> TraceRow:
        size, *counts, nonfinite = map(int, self.counts)
        zeros, underflows, subnormals, overflows = (n / max(size, 1) for n in counts)
        return TraceRow(
            **site.described(),
            is_backward=site.is_backward,
            order=self.order,
            times=self.times,
            dtype=str(self.dtype),
            amax=self.amax,
            smallest=0.0 if self.smallest == float("inf") else self.smallest,
            mean=self.sum / max(size - nonfinite, 1),
            size=size,
            zeros=zeros,
            underflows=underflows,
            subnormals=subnormals,
            overflows=overflows,
            nonfinite=nonfinite,
            made_nonfinite=self.made_nonfinite,
            lost_integers=self.lost_integers,
            rounding=self.rounding and self.rounding.relative_error,
        )


def _measure(x: Array, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Ranges and counts of an array; sizes are rounded up, to compile for few sizes."""
    x = jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
    size = x.size if x.size > _LARGE else max(256, 1 << (x.size - 1).bit_length())
    ranges, counts = _measure_flat(_flat(x, size), dtype)
    removed = np.asarray(counts[-1]) + size - x.size
    counts = np.asarray(counts[:-1], np.int64)
    counts[[_COUNTS.index("size"), _COUNTS.index("zeros")]] -= removed
    return np.asarray(ranges, np.float64), counts


def _measure_quantized(
    array: Array, quantized: Quantized
) -> tuple[np.ndarray, np.ndarray]:
    """Ranges of an array, and counts of what became of it in a small format."""
    values, dtype = quantized.values, quantized.values.dtype
    ranges, counts = _measure(array, array.dtype.name)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    small = float(jnp.finfo(dtype).smallest_normal) if is_float else 0.0
    magnitudes = jnp.abs(values.astype(jnp.float32))
    became_zero = jnp.sum((magnitudes == 0) & (array != 0))
    subnormal = jnp.sum((magnitudes > 0) & (magnitudes < small))
    counts[_COUNTS.index("underflows")] = became_zero
    counts[_COUNTS.index("subnormals")] = subnormal
    return ranges, counts


@functools.partial(jax.jit, static_argnums=1)
def _flat(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x.reshape(-1), (0, size - x.size))


@functools.partial(jax.jit, static_argnums=1)
def _measure_flat(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    # In every dtype, the largest number stands for a mask.
    is_mask = jnp.abs(x) == jnp.finfo(x.dtype).max
    (found,) = statistics([jnp.where(is_mask, jnp.zeros_like(x), x)], dtype).values()
    total = found.mean * (found.size - found.nonfinite).astype(jnp.float32)
    counts = [getattr(found, name) for name in _COUNTS]
    return (
        jnp.stack([found.amax, found.smallest, total]),
        jnp.stack([*counts, is_mask.sum(dtype=jnp.int32)]),
    )


def _lost_integers(site: ReplaySite, operands: Arrays, dtype: str) -> float:
    """Which fraction of integers changes when they are turned into floating numbers."""
    if site.primitive == "iota":
        integers = np.arange(site.eqn.params["shape"][site.eqn.params["dimension"]])
    elif site.primitive == CAST and jnp.issubdtype(operands[0].dtype, jnp.integer):
        integers = np.asarray(operands[0])
    else:
        return 0.0
    exact = integers.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        floats = exact.astype(site.eqn.outvars[0].aval.dtype)
        held = floats.astype(jnp.dtype(dtype)).astype(np.float64)
    return float(np.mean((held != exact) & np.isfinite(held))) if exact.size else 0.0
