"""`PolicySearch`: what has to stay in float32, as rules, text, rows and a chart."""

import dataclasses
import math
import os
from typing import Any

from jaxmp._views import html
from jaxmp._views.figures import GOOD, LOST, new_axes
from jaxmp._views.numbers import power
from jaxmp._views.result import Result
from jaxmp._views.tables import shortened_table, text_table
from jaxmp.casting import OpRule
from jaxmp.numerics.search._blame import Kept
from jaxmp.numerics.search._evaluation import Evaluation
from jaxmp.policy import PolicyRule

_KEPT_COLUMNS = ("float32", "error it adds", "why")
_CURVE_COLUMNS = (
    *("kept", "matmul FLOPs in half", "loss error", "gradient error", "float32"),
)
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class PolicySearch(Result):
    """The smallest set of layers and operations that have to stay in float32.

    Attributes:
      policy: what was searched from, as `str` writes it.
      tolerance: the error that loss and gradients may have.
      loss_scale: the scale that the gradients were computed at.
      kept: what stays in float32, the worst first: `name`, `rule`, `error`, `reason`.
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
        kept = len(self.kept)
        stays = "layer or operation stays" if kept == 1 else "layers or operations stay"
        found = (
            f"{kept or 'No'} {stays} in float32, {self.result.half_flops:.1%} of the "
            "matmul FLOPs run in half. Loss and gradients are off by "
            f"{self.result.error:.2g}, {'within' if self.is_within else 'NOT within'} "
            f"{self.tolerance:g}, at loss scale {power(self.loss_scale)} "
            f"({len(self.evaluations)} evaluations)."
        )
        if not self.is_within and self.is_minimal:
            found += " Not even all that a rule can name in float32 is enough."
        elif not self.is_within:
            found += " The budget ended before a good set was found."
        elif not self.is_minimal:
            found += " The budget ended before a smaller set could be ruled out."
        return found

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives the cost curve: what was evaluated, the most FLOPs in half first.

        Returns:
          Dictionaries with `kept`, `half_flops`, `loss_error`, `gradient_error`,
          `error` and `is_within`.
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
                {"name": k.name, "error": k.error, "reason": k.reason}
                for k in self.kept
            ],
            "curve": self.to_rows(),
        }

    def _page(self) -> str:
        styles = ["good" if row["is_within"] else "bad" for row in self.to_rows()]
        return html.page(
            "What has to stay in float32",
            html.paragraph(self.summary),
            html.table(_KEPT_COLUMNS, self._kept_cells()),
            html.heading("What was tried"),
            html.table(_CURVE_COLUMNS, self._curve_cells(), styles=styles),
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
        kept = self._kept_cells()
        parts = [text_table(_KEPT_COLUMNS, kept)] if kept else []
        curve = shortened_table(_CURVE_COLUMNS, self._curve_cells(), _SHOWN)
        return "\n\n".join([self.summary, *parts, curve])

    def _kept_cells(self) -> list[tuple[str, ...]]:
        return [(k.name, _error(k.error), k.reason) for k in self.kept]

    def _curve_cells(self) -> list[tuple[str, ...]]:
        return [
            (
                str(len(x.kept)),
                f"{x.half_flops:.1%}",
                _error(x.loss_error),
                _error(x.gradient_error),
                ", ".join(x.kept) if len(x.kept) <= 5 else f"{x.kept[0]}, ...",
            )
            for x in self.evaluations
        ]


def _error(error: float) -> str:
    return f"{error:.2g}" if math.isfinite(error) else "overflow"
