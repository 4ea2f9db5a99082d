"""`PolicySearch`: what has to stay in float32, as rules, text, rows and a chart."""

import dataclasses
import math
import os
from typing import Any, TypeAlias

from jaxmp._views import html
from jaxmp._views.figures import GOOD, LOST, new_axes
from jaxmp._views.numbers import power
from jaxmp._views.result import Result
from jaxmp._views.tables import shortened_table, text_table
from jaxmp.casting import OpRule
from jaxmp.numerics.search._blame import Kept
from jaxmp.numerics.search._evaluation import Evaluation
from jaxmp.policy import PolicyRule

_KEPT_COLUMNS = ("error it adds", "why")
_CURVE_COLUMNS = ("kept", "matmul FLOPs in half", "loss error", "gradient error")
_SMALLER = "in a smaller format"
_SHOWN = 20
_Table: TypeAlias = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class PolicySearch(Result):
    """The smallest set of layers and operations that have to stay in float32, or half.

    Attributes:
      policy: what was searched from, as `str` writes it.
      tolerance: the error that loss and gradients may have.
      loss_scale: the scale that the gradients were computed at.
      kept: what stays in float32, or has its matmuls in half, as `stays_in` says, the
        worst first: `name`, `rule`, `error`, `reason`, `stays_in`.
      rules: for `autocast(fn, policy, rules=...)`: the rules of `kept`, then the ones
        given to the search. The `PolicyRule`s among them fit `apply_policy` as well.
      result: the evaluation of `kept`.
      evaluations: everything that was tried, by share of FLOPs in half.
      is_within: whether `result` is within the tolerance.
      is_minimal: whether the search ended before the budget did; if not, fewer may do.
    """

    policy: str
    tolerance: float
    loss_scale: float
    kept: tuple[Kept, ...]
    rules: tuple[PolicyRule | OpRule, ...]
    result: Evaluation
    evaluations: tuple[Evaluation, ...]
    is_within: bool
    is_minimal: bool

    @property
    def summary(self) -> str:
        """What was found, in a sentence or two."""
        kept = len(self._staying("float32"))
        stays = "layer or operation stays" if kept == 1 else "layers or operations stay"
        quantized = self._quantized
        if (in_half := len(self._staying("half"))) or quantized:
            matmuls = "layer stay" if in_half == 1 else "layers stay"
            stays += f" in float32, the matmuls of {in_half or 'no'} {matmuls} in half;"
        else:
            stays += " in float32,"
        found = (
            f"{kept or 'No'} {stays} {self.result.half_flops:.1%} of the "
            f"matmul FLOPs run in half{quantized}. Loss and gradients are off by "
            f"{self.result.error:.2g}, {'within' if self.is_within else 'NOT within'} "
            f"{self.tolerance:.3g}, at loss scale {power(self.loss_scale)} "
            f"({len(self.evaluations)} evaluations)."
        )
        if not self.is_within and self.is_minimal:
            found += " Not even all that a rule can name in float32 is enough."
        elif not self.is_within:
            found += " The budget ended before a good set was found."
        elif not self.is_minimal:
            found += " The budget ended before a smaller set could be ruled out."
        return found

    @property
    def _quantized(self) -> str:
        """The share of the FLOPs in a smaller format, in words, if there is any."""
        share = self.result.quantized_flops
        return f", {share:.1%} {_SMALLER}" if share else ""

    def _staying(self, dtype: str) -> list[Kept]:
        return [kept for kept in self.kept if kept.stays_in == dtype]

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives the cost curve: what was evaluated, the most FLOPs in half first.

        Returns:
          Dictionaries with `kept`, `half_flops`, `quantized_flops`, `loss_error`,
          `gradient_error`, `error` and `is_within`.
        """
        return [
            {
                **dataclasses.asdict(x),
                "kept": list(x.kept),
                "error": x.error,
                "is_within": x.error <= self.tolerance,
            }
            for x in self.evaluations
        ]

    def _contents(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "tolerance": self.tolerance,
            "loss_scale": self.loss_scale,
            "is_within": self.is_within,
            "is_minimal": self.is_minimal,
            "kept": [
                {
                    **{"name": k.name, "error": k.error, "reason": k.reason},
                    "stays_in": k.stays_in,
                }
                for k in self.kept
            ],
            "curve": self.to_rows(),
        }

    def _page(self) -> str:
        styles = ["good" if row["is_within"] else "bad" for row in self.to_rows()]
        return html.page(
            "What has to stay in float32",
            html.paragraph(self.summary),
            *(html.table(*table) for table in self._kept_tables()),
            html.heading("What was tried"),
            html.table(*self._curve(), styles=styles),
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the error over the share of FLOPs in half; needs Matplotlib.

        Args:
          path: file to write; its ending decides on the format.

        Raises:
          MissingPackage: if Matplotlib is not installed.
        """
        axes = new_axes(None, 7, 4)
        finite = [x.error for x in self.evaluations if math.isfinite(x.error)]
        top = 10 * max([*finite, self.tolerance])
        for x in self.evaluations:
            is_chosen = x == self.result
            is_within = x.error <= self.tolerance
            axes.plot(
                100 * x.half_flops,
                max(min(x.error, top), 1e-4 * self.tolerance),
                marker="^" if x.error > top else "o",
                color=GOOD if is_within else LOST,
                markersize=11 if is_chosen else 6,
                markerfacecolor=None if is_chosen else "none",
            )
        # Axes coordinates along x, data coordinates along y.
        beside = axes.get_yaxis_transform()
        axes.axhline(self.tolerance, color="#888", linewidth=1)
        axes.text(0.01, self.tolerance, "tolerance", transform=beside)
        axes.set_yscale("log")
        axes.set_xlabel("matmul FLOPs in half, per cent")
        axes.set_ylabel("relative error (triangle: not finite)")
        axes.set_title(f"{self.policy}: filled is what was chosen", fontsize="medium")
        axes.figure.savefig(path)

    def __str__(self) -> str:
        parts = [text_table(*table) for table in self._kept_tables()]
        curve = shortened_table(*self._curve(), _SHOWN)
        return "\n\n".join([self.summary, *parts, curve])

    def _kept_tables(self) -> list[_Table]:
        """What stays in float32, and what in half."""
        tables = []
        for dtype in ("float32", "half"):
            cells = [(k.name, _error(k.error), k.reason) for k in self._staying(dtype)]
            if cells:
                tables.append(((dtype, *_KEPT_COLUMNS), cells))
        return tables

    def _curve(self) -> _Table:
        """What was tried; a column more if something was quantised."""
        has_quantized = any(x.quantized_flops for x in self.evaluations)
        kept = "kept" if has_quantized else "float32"
        columns = [*_CURVE_COLUMNS, kept]
        rows = [
            [
                str(len(x.kept)),
                f"{x.half_flops:.1%}",
                _error(x.loss_error),
                _error(x.gradient_error),
                ", ".join(x.kept) if len(x.kept) <= 5 else f"{x.kept[0]}, ...",
            ]
            for x in self.evaluations
        ]
        if has_quantized:
            columns.insert(2, _SMALLER)
            for row, x in zip(rows, self.evaluations, strict=True):
                row.insert(2, f"{x.quantized_flops:.1%}")
        return tuple(columns), [tuple(row) for row in rows]


def _error(error: float) -> str:
    return f"{error:.2g}" if math.isfinite(error) else "overflow"
