"""`trace`: the range of every value that a function and its gradient compute.

Each operation of the program (`_interpreter`) is measured as it is carried out, in the
dtype that it has, and its loops are summed up. The question is a "what if": which of
its numbers would be zero, subnormal or infinite in the dtype that is asked about.

Operations that only move numbers (`reshape`, `broadcast_in_dim`, ...) and those whose
results are no floating numbers are left out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.primitives import CAST, LAYOUT
from jaxmp.numerics._formats import format_range
from jaxmp.numerics._statistics import statistics
from jaxmp.numerics.nonfinite._origin import nonfinite
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import read_program
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.numerics.trace._result import Trace, TraceRow
from jaxmp.policy import get_policy

_COUNTS = ("size", "zeros", "underflows", "subnormals", "overflows", "nonfinite")

_SHARES = ("zeros", "underflows", "subnormals", "overflows")


def trace(
    fn: Callable[..., Any],
    policy: Any = None,
    *,
    dtype: Any = None,
    rules: Sequence[Any] = (),
    loss_scale: Any = None,
    argnums: int | Sequence[int] = 0,
    backward: bool | None = None,
) -> Callable[..., Trace]:
    """Measures every value that a function computes, forward and backward.

    The function is run operation by operation, through loops, branches,
    `jax.checkpoint` and custom rules, which takes about as long as compiling it.

    Args:
      fn: function that can be jitted, such as a loss function. nnx modules may be
        arguments.
      policy: run it under `autocast(fn, policy, rules=rules)`; None runs it as it is.
      dtype: what underflow and overflow are asked about: `"float16"`, `"bfloat16"`,
        `"float8_e4m3fn"`, `"float8_e5m2"` or another floating dtype. None is the
        compute dtype of the policy if that is half, and else float16.
      rules: of `autocast`.
      loss_scale: what the loss is multiplied by before the backward pass: a number, an
        optimizer state or a `LossScale`; None is 1.
      argnums: arguments to differentiate with respect to.
      backward: whether to look at the gradient; None does so if `fn` returns a floating
        scalar, alone or first in a tuple.

    Returns:
      A function of the arguments of `fn` that returns a `Trace`.

    Raises:
      NumericsError: if `dtype` is no floating dtype.
      NonScalarLoss: when called, if `backward` is True and `fn` returns no loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import trace
      >>> def loss(w, x):
      ...     return jnp.mean(jnp.exp(w * x))
      >>> traced = trace(loss)(jnp.float32(1.0), jnp.array([12.0, 13.0]))
      >>> worst = traced.rows[0]
      >>> worst.operation, worst.overflows, worst.is_backward
      ('exp', 1.0, False)
    """
    if dtype is None:
        compute = None if policy is None else get_policy(policy).compute_dtype
        dtype = compute if compute in _tree.HALF else jnp.float16
    asked = format_range(dtype)

    def traced(*args: Any, **kwargs: Any) -> Trace:
        program = read_program(
            fn,
            args,
            kwargs,
            policy=policy,
            rules=rules,
            argnums=argnums,
            backward=backward,
            loss_scale=loss_scale,
        )
        meter = _Meter(dtype)
        meter.run_program(program)
        rows = [total.row(site) for site, total in meter.totals.items()]
        rows.sort(key=lambda row: [-x for x in row.badness])
        return Trace(tuple(rows), asked.name, program.loss_scale)

    return traced


class _Meter(Interpreter):
    """Measures the results of every operation."""

    def __init__(self, dtype: Any):
        super().__init__()
        self.dtype = jnp.dtype(dtype)
        self.totals: dict[ReplaySite, _Total] = {}

    def observe(self, site, operands, results):
        results = [x for x in results if _tree.is_inexact(x)]
        if site.primitive in LAYOUT or not results:
            return
        if site not in self.totals:
            lost = _lost_integers(site, operands, self.dtype)
            self.totals[site] = _Total(len(self.totals), results[0].dtype, lost)
        total = self.totals[site]
        total.times += 1
        for x in results:
            total.add(*_measure(x, self.dtype))
        if any(nonfinite(results)) and not any(nonfinite(operands)):
            total.made_nonfinite += 1


def _measure(x: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ranges and counts of an array; sizes are rounded up, to compile for few."""
    x = jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
    size = x.size if x.size > _LARGE else max(256, 1 << (x.size - 1).bit_length())
    ranges, counts = _measure_flat(_flat(x, size), dtype)
    removed = np.asarray(counts[-1]) + size - x.size
    counts = np.asarray(counts[:-1], np.int64)
    counts[[_COUNTS.index("size"), _COUNTS.index("zeros")]] -= removed
    return np.asarray(ranges, np.float64), counts


_LARGE = 2**20


@functools.partial(jax.jit, static_argnums=1)
def _flat(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x.reshape(-1), (0, size - x.size))


@functools.partial(jax.jit, static_argnums=1)
def _measure_flat(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    # The largest number that there is stands for a mask, whatever the dtype.
    is_mask = jnp.abs(x) == jnp.finfo(x.dtype).max
    (found,) = statistics([jnp.where(is_mask, jnp.zeros_like(x), x)], dtype).values()
    total = found.mean * (found.size - found.nonfinite).astype(jnp.float32)
    counts = [getattr(found, name) for name in _COUNTS]
    return (
        jnp.stack([found.amax, found.smallest, total]),
        jnp.stack([*counts, is_mask.sum(dtype=jnp.int32)]),
    )


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

    def add(self, ranges: np.ndarray, counts: np.ndarray) -> None:
        amax, smallest, total = map(float, ranges)
        self.amax = max(self.amax, amax)
        self.smallest = min(self.smallest, smallest or float("inf"))
        self.sum += total
        self.counts = self.counts + counts

    def row(self, site: ReplaySite) -> TraceRow:
        counts = dict(zip(_COUNTS, map(int, self.counts), strict=True))
        size = counts["size"]
        shares = {name: counts[name] / max(size, 1) for name in _SHARES}
        return TraceRow(
            **site.described(),
            is_backward=site.is_backward,
            order=self.order,
            times=self.times,
            dtype=str(self.dtype),
            amax=self.amax,
            smallest=0.0 if self.smallest == float("inf") else self.smallest,
            mean=self.sum / max(size - counts["nonfinite"], 1),
            size=size,
            zeros=shares["zeros"],
            underflows=shares["underflows"],
            subnormals=shares["subnormals"],
            overflows=shares["overflows"],
            nonfinite=counts["nonfinite"],
            made_nonfinite=self.made_nonfinite,
            lost_integers=self.lost_integers,
        )


def _lost_integers(site: ReplaySite, operands: Sequence[Any], dtype: Any) -> float:
    """Which fraction of integers changes when they are turned into floating numbers."""
    (result,) = (v.aval.dtype for v in site.eqn.outvars[:1])
    if site.primitive == "iota":
        integers = np.arange(site.eqn.params["shape"][site.eqn.params["dimension"]])
    elif site.primitive == CAST and jnp.issubdtype(operands[0].dtype, jnp.integer):
        integers = np.asarray(operands[0])
    else:
        return 0.0
    exact = integers.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        held = exact.astype(result).astype(dtype).astype(np.float64)
    return float(np.mean((held != exact) & np.isfinite(held))) if exact.size else 0.0
