"""`Trace`: the ranges of what a function computed, as a table."""

import collections
import dataclasses
from typing import Any

from jaxmp._jaxpr.sources import Source
from jaxmp._views import html
from jaxmp._views.numbers import counted, percent
from jaxmp._views.result import Result
from jaxmp._views.tables import shortened_table
from jaxmp.numerics.ranges._formats import usual_rounding

_COLUMNS = (
    *("operation", "source", "path", "way", "times", "dtype", "largest", "smallest"),
    *("mean", "zero", "underflow", "subnormal", "overflow", "other"),
)
_SHOWN = 40
_MANY_ZEROS = 0.01
_LOSSY = 2.0
_STYLES = {"overflow": "bad", "underflow": "note", "fine": "quiet"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceRow:
    """The results of one operation, over all iterations of the loops around it.

    Attributes:
      operation: name of the primitive; `"quantize"` is what rounds an operand of a
        matmul to float8 or int8 under a scale, and `"scaled_dot"` the matmul itself.
      file, line, function: the user's source line.
      path: name scopes and modules around it.
      is_backward: whether it is part of a backward pass.
      order: place in the order of execution.
      times: how often it was carried out.
      dtype: dtype of the result, as it was run. The figures of a `quantize` are those
        of the array before it was rounded.
      amax: the largest finite magnitude.
      smallest: the smallest finite magnitude that is not zero, 0 if there is none.
      mean: the mean magnitude of the finite numbers.
      size: how many numbers there were. The largest number of the dtype itself, which
        masks are made of, is not counted anywhere.
      zeros: which fraction is zero.
      underflows, subnormals, overflows: which fraction would become zero, subnormal or
        infinite in the dtype that was asked about; of a `quantize`, which fraction
        became zero or subnormal in its own format, under its scale.
      nonfinite: how many are infinite or NaN.
      made_nonfinite: how often it made such a number out of finite ones.
      lost_integers: of the integers that it turned into floating numbers, the fraction
        that this dtype cannot hold, such as positions above 256 in bfloat16.
      rounding: of a `quantize`, by how much it is off: norm of the difference over norm
        of the array. None for all others.
    """

    operation: str
    file: str
    line: int
    function: str
    path: str
    is_backward: bool
    order: int
    times: int
    dtype: str
    amax: float
    smallest: float
    mean: float
    size: int
    zeros: float
    underflows: float
    subnormals: float
    overflows: float
    nonfinite: int
    made_nonfinite: int
    lost_integers: float
    rounding: float | None = None

    @property
    def badness(self) -> tuple[float, ...]:
        """What rows are sorted by: the larger, the worse."""
        lost = max(self.overflows, self.lost_integers)
        small = (self.underflows, self.subnormals)
        if self.rounding is not None and not self._is_lossy:
            small = (0.0, 0.0)
        return (float(self.made_nonfinite > 0), lost, *small)

    @property
    def kind(self) -> str:
        """`"overflow"`, `"underflow"` or `"fine"`.

        A `quantize` is fine as long as it loses about what its format loses of normally
        distributed numbers.
        """
        if self.made_nonfinite or self.overflows or self.lost_integers:
            return "overflow"
        if self.rounding is not None:
            return "underflow" if self._is_lossy else "fine"
        return "underflow" if self.underflows or self.subnormals else "fine"

    @property
    def _is_lossy(self) -> bool:
        """Whether a `quantize` loses more than its format does of normal numbers."""
        assert self.rounding is not None
        # int8 has equal steps: there, small numbers become zero in any row.
        is_zeroing = self.dtype != "int8" and self.underflows > _MANY_ZEROS
        return is_zeroing or self.rounding > _LOSSY * usual_rounding(self.dtype)

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        other = []
        if self.rounding is not None:
            other.append(f"off by {self.rounding:.1%}")
        if self.nonfinite:
            other.append(f"{self.nonfinite} not finite")
        if self.lost_integers:
            other.append(f"{self.lost_integers:.0%} of the integers lost")
        shares = (self.zeros, self.underflows, self.subnormals, self.overflows)
        return (
            self.operation,
            Source(self.file, self.line, self.function).short * bool(self.file),
            self.path,
            "backward" if self.is_backward else "forward",
            str(self.times),
            self.dtype,
            *(f"{x:.3g}" for x in (self.amax, self.smallest, self.mean)),
            *map(percent, shares),
            ", ".join(other),
        )


@dataclasses.dataclass(frozen=True)
class Trace(Result):
    """The ranges of what a function computed, the worst first.

    Attributes:
      rows: one `TraceRow` for each operation.
      dtype: name of the dtype that was asked about.
      loss_scale: what the backward pass was multiplied by, None without gradients.
    """

    rows: tuple[TraceRow, ...]
    dtype: str
    loss_scale: float | None

    @property
    def summary(self) -> str:
        """The figures in one line."""
        kinds = collections.Counter(row.kind for row in self.rows)
        scale = f" at loss scale {self.loss_scale:g}" if self.loss_scale else ""
        return (
            f"{len(self.rows)} operations{scale}; in {self.dtype}, "
            f"{kinds['overflow']} would overflow and {kinds['underflow']} lose small "
            f"numbers{self._rounded}"
        )

    @property
    def _rounded(self) -> str:
        """What was rounded for quantised matmuls, in words."""
        found: dict[str, list[float]] = collections.defaultdict(list)
        for row in self.rows:
            if row.rounding is not None:
                found[row.dtype].append(row.rounding)
        return "".join(
            f"; {counted(len(errors), 'operand')} of matmuls rounded to {dtype}, off "
            f"by {max(errors):.1%} at most"
            for dtype, errors in found.items()
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives the rows as dictionaries, for a data frame."""
        return [dataclasses.asdict(row) for row in self.rows]

    def _page(self) -> str:
        kinds = [row.kind for row in self.rows]
        return html.page(
            f"What {self.dtype} would lose",
            html.paragraph(self.summary),
            html.checkboxes(_STYLES),
            html.table(
                _COLUMNS,
                [row.cells() for row in self.rows],
                code=("operation", "dtype"),
                styles=[_STYLES[kind] for kind in kinds],
                kinds=kinds,
            ),
        )

    def __str__(self) -> str:
        cells = [row.cells() for row in self.rows]
        return f"{shortened_table(_COLUMNS, cells, _SHOWN)}\n\n{self.summary}"
