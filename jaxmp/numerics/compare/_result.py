"""What `compare` found, as rows, text, JSON and a page."""

import dataclasses
import functools
import json
import math
from typing import Any

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.numbers import percent
from jaxmp.errors import NumericsError
from jaxmp.numerics.compare.rows import ActivationRow, GradientRow, PolicyRow

_SHOWN = 15
_POLICY_COLUMNS = (
    *("policy", "output error", "worst gradient", "loss scale"),
    *("smallest scale", "largest scale", "lost at scale 1", "lost at largest"),
)
_FIGURES = ("error", "cosine", "SNR dB", "zeroed", "not finite")
_LAYER_COLUMNS = ("policy", "layer", "source", "dtype", *_FIGURES)
_OPERATION_COLUMNS = ("policy", "operation", "source", "path", "dtype", *_FIGURES)
_GRADIENT_COLUMNS = ("policy", "parameter", *_FIGURES, "zeroed at scale 1")
_MARKS = {
    "nonfinite": "bad",
    "inaccurate": "bad",
    "underflow": "note",
    "fine": "quiet",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A function under policies, held against itself in float32; worst rows first.

    Attributes:
      reference: the dtype of the reference.
      policies: one `PolicyRow` for each policy, in the order that they were given.
      activations: one `ActivationRow` for each operation and policy.
      gradients: one `GradientRow` for each parameter and policy; empty without a loss.
    """

    reference: str
    policies: tuple[PolicyRow, ...]
    activations: tuple[ActivationRow, ...]
    gradients: tuple[GradientRow, ...]

    def policy(self, name: str) -> PolicyRow:
        """Returns the row of a policy.

        Args:
          name: as it was given, or as `str` writes it.

        Returns:
          Its `PolicyRow`.

        Raises:
          NumericsError: if there is none.

        Example:
          >>> import jax.numpy as jnp
          >>> from jaxmp.numerics import compare
          >>> compare(jnp.sin, "bfloat16", jnp.ones(3)).policy("bfloat16").dtype
          'bfloat16'
        """
        for row in self.policies:
            if row.policy == name:
                return row
        names = ", ".join(repr(row.policy) for row in self.policies)
        raise NumericsError(f"{name!r} was not compared. There are: {names}.")

    @functools.cached_property
    def layers(self) -> tuple[ActivationRow, ...]:
        """The last operation of each path: what the layer returns. Worst first."""
        last: dict[tuple[str, str], ActivationRow] = {}
        for row in sorted(self.activations, key=lambda row: row.order):
            last[row.policy, row.path] = row
        kept = {id(row) for row in last.values()}
        return tuple(row for row in self.activations if id(row) in kept)

    @property
    def kinds(self) -> frozenset[str]:
        """Of everything that was found: see `ActivationRow.kind`."""
        return frozenset(row.kind for row in (*self.activations, *self.gradients))

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives everything as one list of flat dictionaries.

        Returns:
          Rows whose `"table"` is `"policy"`, `"activation"` or `"gradient"`.
        """
        return [
            {"table": table, **dataclasses.asdict(row)}
            for table, rows in (
                ("policy", self.policies),
                ("activation", self.activations),
                ("gradient", self.gradients),
            )
            for row in rows
        ]

    def to_json(self) -> str:
        """Gives all rows as JSON; what is not finite is null."""
        rows = [{k: _plain(v) for k, v in row.items()} for row in self.to_rows()]
        return json.dumps({"reference": self.reference, "rows": rows}, indent=1)

    def to_html(self, path: Any) -> None:
        """Writes one self-contained page.

        Args:
          path: file to write.
        """
        parts = [_html.checkboxes(_MARKS)]
        for title, columns, rows in self._tables():
            marks = [_MARKS[kind] for _, kind in rows]
            parts += [
                _html.heading(title),
                _html.table(
                    columns,
                    [cells for cells, _ in rows],
                    code=("operation", "dtype"),
                    styles=marks,
                    kinds=[kind for _, kind in rows],
                ),
            ]
        _html.writer(self._title, *parts)(path)

    @property
    def _title(self) -> str:
        return f"Policies against {self.reference}"

    def __str__(self) -> str:
        parts = []
        for title, columns, rows in self._tables():
            shown = [cells for cells, _ in rows[:_SHOWN]]
            left = len(rows) - len(shown)
            more = f"\n... and {left} more: to_rows(), to_html(path)" if left else ""
            parts.append(f"{title}\n{_table.text_table(columns, shown)}{more}")
        return "\n\n".join(parts)

    def _tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[Any, str]]]]:
        layers = [
            ((r.policy, r.path or "-", r.source, r.dtype, *r.cells()), r.kind)
            for r in self.layers
        ]
        operations = [
            (
                (r.policy, r.operation, r.source, r.path, r.dtype, *r.cells()),
                r.kind,
            )
            for r in self.activations
        ]
        gradients = [
            (
                (r.policy, r.parameter, *r.cells(), percent(r.zeroed_unscaled)),
                r.kind,
            )
            for r in self.gradients
        ]
        policies = [(row.cells(), "fine") for row in self.policies]
        tables = [
            (self._title, _POLICY_COLUMNS, policies),
            ("Gradients", _GRADIENT_COLUMNS, gradients),
            ("What layers return", _LAYER_COLUMNS, layers),
            ("Operations", _OPERATION_COLUMNS, operations),
        ]
        return [table for table in tables if table[2]]


def _plain(value: Any) -> Any:
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
