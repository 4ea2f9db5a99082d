"""`Description`: the layers of a module under a policy, as `describe` returns them."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxmp._views.html import page, paragraph, table
from jaxmp._views.result import Result
from jaxmp._views.tables import text_table

_OPTIONAL = ("reduces", "multiplies")


class Row(NamedTuple):
    """One layer; dtypes are names, several are joined by commas."""

    path: str
    type: str
    stored: str
    computes: str
    returns: str
    rule: str
    reduces: str = ""
    multiplies: str = ""


@dataclasses.dataclass(frozen=True)
class Description(Result):
    """The layers of a module under a policy; `print` shows them as a table.

    The last column names who decided: the policy, a rule, "handed down" if the model
    hands its own `dtype` down, or "author's dtype" if it is written at the layer. A
    user's layer returns "as planned": half from a matmul, float32 from a sum.

    Attributes:
      title: the policy, and the one that it replaces.
      rows: one row for every layer: `path`, `type`, and the dtypes that it `stored`,
        `computes` and `returns`, with the `rule` that decided; and the dtype in which
        it `reduces` the gradients of its weights, if the policy or a rule names one;
        and how it `multiplies`, if the policy or a rule asks for a smaller format: the
        recipe, or why its matmuls are left in half.
      formats: a line for each recipe, and for each reason to leave matmuls in half,
        with their share of the FLOPs. Empty without example arguments.
    """

    title: str
    rows: tuple[Row, ...]
    formats: tuple[str, ...] = ()

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives every layer as a dictionary, repeated blocks included."""
        return [row._asdict() for row in self.rows]

    def _contents(self) -> dict[str, Any]:
        contents = {"title": self.title, "rows": self.to_rows()}
        return {**contents, "formats": self.formats} if self.formats else contents

    def _page(self) -> str:
        columns, cells = self._table()
        shares = map(paragraph, self.formats)
        return page(self.title, *shares, table(columns, cells, code=("path",)))

    def __str__(self) -> str:
        columns, cells = self._table()
        columns = [column.upper() for column in columns]
        shares = "".join(f"\n{line}" for line in self.formats)
        return f"{self.title}{shares}\n\n{text_table(columns, cells)}"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """The columns and their cells, without a column that is empty throughout."""
        rows = _folded(self.rows)
        columns = [
            name
            for name in Row._fields
            if name not in _OPTIONAL or any(getattr(row, name) for row in rows)
        ]
        return columns, [[getattr(row, name) for name in columns] for row in rows]


def outer_first(rows: Iterable[Row]) -> list[Row]:
    """Orders layers as they were entered; a call ends after those inside it."""
    rows = list(rows)
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        for path in _paths_down_to(row.path):
            first.setdefault(path, i)
    return sorted(rows, key=lambda row: [first[p] for p in _paths_down_to(row.path)])


def _paths_down_to(path: str) -> list[str]:
    """Lists `"", "a", "a/b"` for `"a/b"`."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def natural_order(row: Row) -> list[Any]:
    """Orders paths as a person would: blocks_2 comes before blocks_10."""
    parts = re.split(r"(\d+)", row.path.replace("/", " "))
    return [int(part) if part.isdigit() else part for part in parts]


def _folded(rows: Iterable[Row]) -> list[Row]:
    """Gives blocks that differ only in their number one line for each row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"_\d+(?=/|$)", "_*", row.path)
        groups.setdefault((pattern, *row[1:]), []).append(row)
    return [
        group[0]._replace(path=f"{pattern} ({len(group)} times)")
        if len(group) > 1
        else group[0]._replace(path=group[0].path or "(model)")
        for (pattern, *_), group in groups.items()
    ]
