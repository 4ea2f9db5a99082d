"""`monitor_report`: what a `monitor` measured, on the host, for people to read."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxmp._views import html
from jaxmp._views.result import Result
from jaxmp._views.tables import shortened_table
from jaxmp.errors import NotOnHost
from jaxmp.loss_scale.state import find_all
from jaxmp.numerics.monitor._leaf_report import COLUMNS, LeafReport, leaf_report
from jaxmp.numerics.monitor._measurement import Measurement, get_statistics
from jaxmp.numerics.ranges._formats import format_range

_MUCH_LOST, _MUCH_UNDERFLOW = 0.1, 0.05
_LARGE_RATIO = 0.1
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class MonitorReport(Result):
    """What a `monitor` measured last; prints as a table with the worst leaves first.

    Attributes:
      step: the update that was measured, counted from 1; 0 before the first.
      dtype: the dtype in which underflow and overflow are counted.
      loss_scale: by which gradients are multiplied for that.
      rows: one for each parameter, with the columns of `to_rows`.
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
        return sorted(self.rows, key=lambda row: row.badness, reverse=True)[:count]

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

    def _cells(self) -> list[list[str]]:
        return [row.cells() for row in self.worst(len(self.rows))]

    def _page(self) -> str:
        warnings = map(html.paragraph, self.warnings if self.step else ())
        table = html.table(COLUMNS, self._cells() if self.step else ())
        return html.page(self._title, *warnings, table)

    def __str__(self) -> str:
        if not self.step:
            return self._title
        table = shortened_table(COLUMNS, self._cells(), _SHOWN)
        return "\n".join([self._title, table, *(f"- {w}" for w in self.warnings)])


def monitor_report(
    opt_state: Any, *, dtype: DTypeLike = "float16", loss_scale: float | None = None
) -> MonitorReport:
    """Reads on the host what a `monitor` measured last.

    It waits for the step that made the state: call it after a measured one.

    Args:
      opt_state: the state of `monitor`, or anything that contains one.
      dtype: in which underflow and overflow are counted. They come from the histogram
        of exponents, so any dtype and any scale will do, whatever was measured for;
        numbers within a power of two of a border may count on its other side.
      loss_scale: by which gradients are multiplied for that; by default the one that
        the state holds now, if it holds one. 1 shows what would be lost without.

    Returns:
      A `MonitorReport`.

    Raises:
      MissingState: if `opt_state` holds no state of `monitor`.
      NotOnHost: if called in a compiled function.
      NumericsError: if `dtype` is not a floating dtype.

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
            "it outside jit, on the state that the step returned; inside, use "
            "get_statistics()."
        ) from None
    if loss_scale is None:
        loss_scale = _scale_in(opt_state)
    return MonitorReport(
        step=int(found.step),
        dtype=format_range(dtype).name,
        loss_scale=float(loss_scale),
        rows=tuple(leaf_report(p, found, dtype, loss_scale) for p in found.gradients),
        nonfinite_step=int(found.nonfinite_step),
        measurement=found,
    )


def _scale_in(opt_state: Any) -> float:
    scales = find_all(opt_state)
    return float(jax.tree.leaves(scales[0].loss_scale)[0]) if scales else 1.0


def _warnings(report: MonitorReport) -> Iterator[str]:
    scaled = f"in {report.dtype} at the loss scale {report.loss_scale:g}"
    if rows := [row for row in report.rows if row.underflow > _MUCH_UNDERFLOW]:
        yield (
            f"Gradients become zero {scaled}: {_about(rows, lambda r: r.underflow)}. A "
            "higher scale loses fewer; bfloat16 loses none."
        )
    if rows := [row for row in report.rows if row.overflow > 0]:
        yield (
            f"Gradients overflow {scaled}: {_about(rows, lambda r: r.overflow)}. The "
            "step would be skipped and the scale lowered; if that goes on, look at "
            "these layers, or compute them in bfloat16."
        )
    if rows := [row for row in report.rows if row.lost > _MUCH_LOST]:
        yield (
            "Updates are too small for their weights' dtype and are lost: "
            f"{_about(rows, lambda r: r.lost)}. Keep a float32 copy with "
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


def _about(rows: Sequence[LeafReport], share: Callable[[LeafReport], float]) -> str:
    """The worst of some rows, and how many more there are."""
    worst = max(rows, key=share)
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{share(worst):.0%} of {worst.path!r}{more}"
