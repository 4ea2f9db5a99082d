"""`monitor_report`: what a `monitor` measured, on the host, for people to read."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmp._views import html
from jaxmp._views.result import Result
from jaxmp._views.tables import shortened_table
from jaxmp.errors import NotOnHost
from jaxmp.loss_scale.state import find_all
from jaxmp.numerics._formats import format_range
from jaxmp.numerics._statistics import EXPONENTS, Statistics
from jaxmp.numerics.monitor._measurement import Measurement, get_statistics

_MUCH_LOST, _MUCH_UNDERFLOW = 0.1, 0.05
_LARGE_RATIO = 0.1
_SHOWN = 20
_COLUMNS = (
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
    """Mean magnitude of the updates by that of the parameters."""
    lost: float
    """Updates that were not zero and yet left their parameter as it was."""
    nonfinite: int
    """Gradients that were not finite in the last step that had such."""


@dataclasses.dataclass(frozen=True)
class MonitorReport(Result):
    """What a `monitor` measured last; prints as a table with the worst leaves first.

    Attributes:
      step: the update that was measured, counted from 1; 0 before the first.
      dtype: the dtype in which underflow and overflow are asked about.
      loss_scale: by which gradients are multiplied for that.
      rows: one `LeafReport` for each parameter.
      nonfinite_step: the last update with a non-finite gradient; 0 if there was none.
      measurement: the arrays behind it, in NumPy.
    """

    step: int
    dtype: str
    loss_scale: float
    rows: tuple[LeafReport, ...]
    nonfinite_step: int
    measurement: Measurement

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives one dictionary for each parameter, for a data frame or a log."""
        return [{"step": self.step, **row._asdict()} for row in self.rows]

    def worst(self, count: int = 10) -> list[LeafReport]:
        """The parameters with the most to worry about.

        Args:
          count: how many.
        """
        return sorted(self.rows, key=_badness, reverse=True)[:count]

    @property
    def warnings(self) -> list[str]:
        """What to do about what was measured, a sentence for each finding."""
        return list(_warnings(self))

    @property
    def _title(self) -> str:
        if not self.step:
            return "monitor: no step was measured yet."
        return (
            f"Step {self.step}: gradients in {self.dtype} under the loss scale "
            f"{self.loss_scale:g}, updates and weights as they are."
        )

    def _page(self) -> str:
        rows = self.worst(len(self.rows)) if self.step else []
        return html.page(
            self._title,
            *map(html.paragraph, self.warnings),
            html.table(_COLUMNS, map(_cells, rows)),
        )

    def __str__(self) -> str:
        if not self.step:
            return self._title
        cells = list(map(_cells, self.worst(len(self.rows))))
        lines = [self._title, shortened_table(_COLUMNS, cells, _SHOWN)]
        return "\n".join([*lines, *(f"- {warning}" for warning in self.warnings)])


def monitor_report(
    opt_state: Any, *, dtype: Any = "float16", loss_scale: float | None = None
) -> MonitorReport:
    """Reads on the host what a `monitor` measured last.

    It waits for the step that made the state: call it when something was measured.

    Args:
      opt_state: the state of `monitor`, or anything that contains one.
      dtype: in which underflow and overflow are asked about. They are counted from
        the histogram of exponents, so that any dtype and any scale can be asked about
        afterwards; numbers within a power of two of a border may count on its other
        side.
      loss_scale: by which gradients are multiplied for that; by default the one that
        the state holds now, if it holds one. 1 asks what would be lost without.

    Returns:
      A `MonitorReport`.

    Raises:
      MissingState: if there is no state of `monitor`.
      NotOnHost: if called in a compiled function.
      NumericsError: if `dtype` is no floating dtype.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.numerics import monitor, monitor_report
      >>> tx = monitor(jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16"), every=1)
      >>> params = {"w": jnp.ones(4)}
      >>> grads = {"w": jnp.array([0.0, 1e-13, 1e-4, 2.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [row] = monitor_report(state).rows
      >>> print(row.zero, row.underflow, row.overflow)
      0.25 0.25 0.25
    """
    found = get_statistics(opt_state)
    try:
        found = jax.tree.map(np.asarray, found)
    except jax.errors.TracerArrayConversionError:
        raise NotOnHost(
            "monitor_report() reads values and was called in a compiled function. Call "
            "it outside of jit, on the state that the step returned; within, there is "
            "get_statistics()."
        ) from None
    scale = _scale_in(opt_state) if loss_scale is None else float(loss_scale)
    return MonitorReport(
        step=int(found.step),
        dtype=format_range(dtype).name,
        loss_scale=scale,
        rows=tuple(_leaf(path, found, dtype, scale) for path in found.gradients),
        nonfinite_step=int(found.nonfinite_step),
        measurement=found,
    )


def _scale_in(opt_state: Any) -> float:
    scales = find_all(opt_state)
    return float(jax.tree.leaves(scales[0].loss_scale)[0]) if scales else 1.0


def exponent_shares(
    statistics: Statistics, dtype: Any, loss_scale: float = 1.0
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


def _leaf(path: str, found: Measurement, dtype: Any, loss_scale: float) -> LeafReport:
    grads, params = found.gradients[path], found.params[path]
    return LeafReport(
        path=path,
        size=int(params.size),
        gradient_amax=float(grads.amax),
        gradient_mean=float(grads.mean),
        zero=float(grads.zeros) / max(int(grads.size), 1),
        **exponent_shares(grads, dtype, loss_scale),
        update_ratio=float(found.update_ratios[path]),
        lost=float(found.lost_updates[path]) / max(int(params.size), 1),
        nonfinite=int(found.nonfinite[path]),
    )


def _badness(row: LeafReport) -> tuple[float, ...]:
    return (row.overflow > 0, row.underflow + row.lost, row.zero, row.subnormal)


def _cells(row: LeafReport) -> list[str]:
    return [
        *(row.path, f"{row.size:,}", f"{row.gradient_amax:.1e}"),
        *(f"{row.gradient_mean:.1e}", f"{row.zero:.1%}", f"{row.underflow:.1%}"),
        *(f"{row.overflow:.1%}", f"{row.update_ratio:.1e}", f"{row.lost:.1%}"),
        str(row.nonfinite),
    ]


def _warnings(report: MonitorReport) -> Any:
    def about(rows, share):
        worst = max(rows, key=share)
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        return f"{share(worst):.0%} of {worst.path!r}{more}"

    scaled = f"in {report.dtype} at the loss scale {report.loss_scale:g}"
    if rows := [row for row in report.rows if row.underflow > _MUCH_UNDERFLOW]:
        yield (
            f"Gradients become zero {scaled}: {about(rows, lambda r: r.underflow)}. A "
            "higher scale loses fewer; bfloat16 loses none."
        )
    if rows := [row for row in report.rows if row.overflow > 0]:
        yield (
            f"Gradients overflow {scaled}: {about(rows, lambda r: r.overflow)}. The "
            "step would be skipped and the scale lowered; if that goes on, look at "
            "these layers, or compute them in bfloat16."
        )
    if rows := [row for row in report.rows if row.lost > _MUCH_LOST]:
        yield (
            "Updates are too small for their weights' dtype and are lost: "
            f"{about(rows, lambda r: r.lost)}. Keep a float32 copy with "
            "jaxmp.master_weights(optimizer), or use jaxmp.stochastic_rounding."
        )
    if rows := [row for row in report.rows if row.zero == 1 and row.size]:
        yield f"Every gradient is zero: {', '.join(row.path for row in rows[:5])}."
    if rows := [row for row in report.rows if row.update_ratio > _LARGE_RATIO]:
        worst = max(rows, key=lambda row: row.update_ratio)
        yield (
            f"An update is {worst.update_ratio:.0%} of the weights in {worst.path!r}. "
            "Lower the learning rate, or warm it up."
        )
    if rows := [row for row in report.rows if row.nonfinite]:
        yield (
            f"Step {report.nonfinite_step} had non-finite gradients in "
            f"{', '.join(f'{row.path} ({row.nonfinite})' for row in rows[:5])}."
        )
