"""What `explain` returns: a summary, reasons for float32, a row per operation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxmp._views import html
from jaxmp._views.result import Result
from jaxmp._views.tables import text_table
from jaxmp.casting.explanation._backward import Backward
from jaxmp.casting.explanation.shares import Reason
from jaxmp.casting.quantized.formats import MatmulFormat, format_lines
from jaxmp.errors import NoSuchRows

_COLUMNS = ("operation", "source", "path", "before", "after", "class", "reason")


class Row(NamedTuple):
    """One operation.

    Attributes:
      operation: name of the primitive, with the name of the function for a call.
      source: file, line and function of the user's code.
      path: name scopes and modules around it.
      before, after: dtypes of the operands and results, as in `"f32 f32 -> f32"`.
      op_class: `compute`, `full`, `follow` or `untouched`.
      reason: why.
      half_flops, full_flops: what matmuls cost in half and otherwise, as often as they
        run; of a call, those in it if it is bound whole.
      recipe: how a matmul in half is multiplied in a smaller format; empty if it is
        not.
    """

    operation: str
    source: str
    path: str
    before: str
    after: str
    op_class: str
    reason: str
    half_flops: float = 0.0
    full_flops: float = 0.0
    recipe: str = ""


_SELECTIONS: dict[str, Callable[[Row], bool]] = {
    "float32 matmuls": lambda row: row.full_flops > 0,
    "half matmuls": lambda row: row.half_flops > 0,
    "matmuls": lambda row: row.full_flops + row.half_flops > 0,
    "quantized matmuls": lambda row: bool(row.recipe),
    "compute": lambda row: row.op_class == "compute",
    "full": lambda row: row.op_class == "full",
    "follow": lambda row: row.op_class == "follow",
    "untouched": lambda row: row.op_class == "untouched",
}


@dataclasses.dataclass(frozen=True)
class Explanation(Result):
    """What autocast decides about one call of a function.

    Attributes:
      rows: one `Row` for each operation that has a floating operand or result.
      half_flops: share of the matmul FLOPs that run in half, between 0 and 1.
      reasons: why the others do not, the costliest first: `reason`, `source` (the line
        that decided it), `flops` and `matmuls`, how many they are.
      matmul_flops: all of these FLOPs.
      wants_half: whether the policy computes in half.
      casts: how many casts are inserted.
      islands: how many float32 islands there are.
      backward: what their backward passes keep besides half inputs, and what they
        compute again: `kept`, `numbers`, `again`, `islands`, `source`.
      quantized: the matmuls in half, in which format each is multiplied, and why:
        `path`, `source`, `recipe`, `reason`, `shape`, `flops`. Empty unless the policy
        or a rule asks for a smaller format.
      residual_bytes: what a backward pass keeps, in bytes by dtype; empty if the
        function cannot be differentiated in reverse.
    """

    rows: tuple[Row, ...]
    half_flops: float
    reasons: tuple[Reason, ...]
    matmul_flops: float
    wants_half: bool
    casts: int
    islands: int
    backward: tuple[Backward, ...]
    residual_bytes: dict[str, int]
    quantized: tuple[MatmulFormat, ...] = ()

    def only(self, which: str) -> "Explanation":
        """The same with some of the rows.

        Args:
          which: `"float32 matmuls"`, `"half matmuls"`, `"quantized matmuls"`,
            `"matmuls"`, or a class:
            `"compute"`, `"full"`, `"follow"`, `"untouched"`.

        Raises:
          NoSuchRows: for anything else.

        Example:
          >>> import jax.numpy as jnp, jaxmp
          >>> plan = jaxmp.explain(lambda x: jnp.dot(x @ x, x, precision="highest"))(
          ...     jnp.ones((2, 2)))
          >>> [row.reason for row in plan.only("float32 matmuls").rows]
          ['precision=HIGHEST']
        """
        if which not in _SELECTIONS:
            known = ", ".join(map(repr, _SELECTIONS))
            raise NoSuchRows(f"explain has no rows {which!r}. Write one of {known}.")
        rows = tuple(filter(_SELECTIONS[which], self.rows))
        return dataclasses.replace(self, rows=rows)

    @property
    def quantized_flops(self) -> float:
        """The share of the matmul FLOPs in a smaller format than half, 0 to 1."""
        found = sum(matmul.flops for matmul in self.quantized if matmul.recipe)
        return found / max(self.matmul_flops, 1)

    @property
    def formats(self) -> tuple[str, ...]:
        """A line for each recipe, and each reason to leave matmuls in half."""
        return format_lines(self.quantized, self.matmul_flops)

    @property
    def summary(self) -> str:
        """The figures in one line."""
        kept = ", ".join(
            f"{size / 2**20:.1f} MiB {dtype}"
            for dtype, size in sorted(self.residual_bytes.items())
        )
        quantized = ""
        if self.quantized:
            quantized = f", {self.quantized_flops:.0%} in a smaller format"
        return (
            f"{self.half_flops:.0%} of the matmul FLOPs in half{quantized} | "
            f"{self.casts} casts | "
            f"{self.islands} float32 islands | kept for the backward pass: "
            f"{kept or 'nothing'}"
        )

    @property
    def why(self) -> tuple[str, ...]:
        """A line for each reason that keeps matmuls out of half, the costliest first.

        The first is a warning if less than half of the FLOPs are in half.
        """
        lines = [_line(reason, self.matmul_flops) for reason in self.reasons]
        if self.wants_half and lines and self.half_flops < 0.5:
            share = f"only {self.half_flops:.0%} of the matmul FLOPs are in half"
            lines.insert(0, f"Warning: {share}. What keeps the others in float32:")
        return tuple(lines)

    def __str__(self) -> str:
        is_warned = bool(self.why) and self.why[0].startswith("Warning")
        lines = [*self.why[:is_warned], self.summary, *self.why[is_warned:]]
        lines += self.formats
        lines += ["", text_table(_COLUMNS, self._cells)]
        return "\n".join([*lines, *map(str, self.backward)])

    @property
    def _cells(self) -> list[tuple[Any, ...]]:
        return [row[: len(_COLUMNS)] for row in self.rows]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(*_COLUMNS)
        for row, cells in zip(self.rows, self._cells, strict=True):
            table.add_row(*cells, style=_STYLES[row.op_class])
        summary = (self.summary, *self.formats)
        return Group(*self.why, *summary, table, *map(str, self.backward))

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives the rows as dictionaries, for a data frame."""
        return [row._asdict() for row in self.rows]

    def _page(self) -> str:
        kinds = [row.op_class for row in self.rows]
        return html.page(
            "What autocast decided",
            *map(html.paragraph, (self.summary, *self.why, *self.formats)),
            html.checkboxes(_MARKS),
            html.table(
                _COLUMNS,
                self._cells,
                code=("operation", "before", "after"),
                styles=[_MARKS[kind] for kind in kinds],
                kinds=kinds,
            ),
            *map(html.paragraph, map(str, self.backward)),
        )


_STYLES = {"compute": "green", "full": "red", "follow": "", "untouched": "dim"}
_MARKS = {"compute": "good", "full": "bad", "follow": "note", "untouched": "quiet"}


def _line(reason: Reason, total: float) -> str:
    count = f"{reason.matmuls} matmul{'s' if reason.matmuls > 1 else ''}"
    where = f", at {reason.source}" if reason.source else ""
    share = f"{reason.flops / total:.1%}"
    return f"{share} of the FLOPs, {count}, not in half: {reason.reason}{where}"
