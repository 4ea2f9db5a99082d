"""What a search for a policy found, as rules, text, rows and a chart."""

import dataclasses
import json
import math
from typing import Any

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.figures import new_figure
from jaxmp._views.numbers import power
from jaxmp.casting import OpRule
from jaxmp.numerics.search._evaluate import Evaluation
from jaxmp.policy import PolicyRule

_KEPT_COLUMNS = ("float32", "error it adds", "why")
_CURVE_COLUMNS = (
    *("kept", "matmul FLOPs in half", "loss error", "gradient error", "float32"),
)
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays in float32, and why.

    Attributes:
      name: path of a layer, or an operation and where it is.
      rule: a `PolicyRule` for a layer, an `OpRule` for an operation.
      error: relative error that it adds by itself in half; infinite for an overflow.
      reason: the operation that does, its line and what happens to it.
    """

    name: str
    rule: PolicyRule | OpRule
    error: float
    reason: str


@dataclasses.dataclass(frozen=True)
class PolicySearch:
    """The smallest set of layers and operations that have to stay in float32.

    Attributes:
      policy: what was searched from, as `str` writes it.
      tolerance: what loss and gradients were to be within.
      loss_scale: that the gradients were computed at.
      kept: what stays in float32, the worst first.
      rules: for `autocast(fn, policy, rules=...)`: those of `kept`, then those that the
        search was given. The `PolicyRule`s among them fit `apply_policy` as well.
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
        if not self.is_within:
            found += (
                " They still are with everything in float32 that a rule can name."
                if self.is_minimal
                else " The budget ended before a set was found that is."
            )
        elif not self.is_minimal:
            found += " The budget ended before every one was tried without."
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

    def to_json(self) -> str:
        """Gives what was found as JSON; an infinite error is null."""
        told = {
            "policy": self.policy,
            "tolerance": self.tolerance,
            "loss_scale": self.loss_scale,
            "is_within": self.is_within,
            "is_minimal": self.is_minimal,
            "kept": [
                {"name": k.name, "error": _finite(k.error), "reason": k.reason}
                for k in self.kept
            ],
            "curve": [
                {name: _finite(x) for name, x in row.items()} for row in self.to_rows()
            ],
        }
        return json.dumps(told, indent=1)

    def to_html(self, path: Any) -> None:
        """Writes one self-contained page.

        Args:
          path: file to write.
        """
        marks = ["good" if row["is_within"] else "bad" for row in self.to_rows()]
        _html.writer(
            "What has to stay in float32",
            _html.paragraph(self.summary),
            _html.table(_KEPT_COLUMNS, self._kept_cells()),
            _html.heading("What was tried"),
            _html.table(_CURVE_COLUMNS, self._curve_cells(), styles=marks),
        )(path)

    def plot(self, path: Any) -> None:
        """Draws the error over the share of FLOPs in half; needs matplotlib.

        Args:
          path: file to write; its ending decides on the format.

        Raises:
          MissingPackage: if matplotlib is not installed.
        """
        figure = new_figure(7, 4)
        axes = figure.add_subplot()
        finite = [x.error for x in self.evaluations if math.isfinite(x.error)]
        top = 10 * max([*finite, self.tolerance])
        for x in self.evaluations:
            is_chosen = x == self.result
            is_within = x.error <= self.tolerance
            axes.plot(
                100 * x.half_flops,
                max(min(x.error, top), 1e-4 * self.tolerance),
                marker="^" if x.error > top else "o",
                color="#2a8a3e" if is_within else "#c43c2c",
                markersize=11 if is_chosen else 6,
                markerfacecolor=None if is_chosen else "none",
            )
        axes.axhline(self.tolerance, color="#888", linewidth=1)
        axes.text(0.01, self.tolerance, "tolerance", transform=_beside(axes))
        axes.set_yscale("log")
        axes.set_xlabel("matmul FLOPs in half, per cent")
        axes.set_ylabel("relative error (triangle: not finite)")
        axes.set_title(f"{self.policy}: filled is what was chosen", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)

    def __str__(self) -> str:
        parts = [self.summary]
        if self.kept:
            parts.append(_table.text_table(_KEPT_COLUMNS, self._kept_cells()))
        cells = self._curve_cells()
        left = len(cells) - _SHOWN
        more = f"\n... and {left} more: to_rows(), to_html(path)" if left > 0 else ""
        parts.append(_table.text_table(_CURVE_COLUMNS, cells[:_SHOWN]) + more)
        return "\n\n".join(parts)

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


def _beside(axes: Any) -> Any:
    """Coordinates of the axes along x, of the data along y."""
    return axes.get_yaxis_transform()


def _error(error: float) -> str:
    return f"{error:.2g}" if math.isfinite(error) else "overflow"


def _finite(value: Any) -> Any:
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
