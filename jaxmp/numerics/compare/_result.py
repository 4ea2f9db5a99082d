"""`Comparison`: what `compare` found, as rows, text, JSON and a page."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmp._views import html
from jaxmp._views.numbers import percent
from jaxmp._views.result import Result
from jaxmp._views.tables import shortened_table
from jaxmp.errors import NumericsError
from jaxmp.numerics.compare.rows import (
    ActivationRow,
    GradientRow,
    MatmulRow,
    PolicyRow,
)

_SHOWN = 15
_POLICY_COLUMNS = (
    *("policy", "output error", "worst gradient", "loss scale"),
    *("smallest scale", "largest scale", "lost at scale 1", "lost at largest"),
)
_FIGURES = ("error", "cosine", "SNR dB", "zeroed", "not finite")
_LAYER_COLUMNS = ("policy", "layer", "source", "dtype", *_FIGURES)
_OPERATION_COLUMNS = ("policy", "operation", "source", "path", "dtype", *_FIGURES)
_MATMUL_COLUMNS = (
    *("policy", "path", "source", "pass", "formats", "usual error", *_FIGURES),
)
_GRADIENT_COLUMNS = ("policy", "parameter", *_FIGURES, "zeroed at scale 1")
_STYLES = {
    "nonfinite": "bad",
    "inaccurate": "bad",
    "underflow": "note",
    "fine": "quiet",
}


class _Table(NamedTuple):
    """A table to show, with the kind of each row."""

    title: str
    columns: Sequence[str]
    cells: list[tuple[str, ...]]
    kinds: list[str]


@dataclasses.dataclass(frozen=True)
class Comparison(Result):
    """A function under policies, compared with itself in float32; worst rows first.

    Attributes:
      reference: the dtype of the reference.
      policies: one `PolicyRow` for each policy, in the order that they were given.
      activations: one `ActivationRow` for each operation and policy.
      gradients: one `GradientRow` for each parameter and policy; empty without a loss.
      matmuls: one `MatmulRow` for each matmul in float8 or int8, backward included;
        empty unless a policy or a rule quantises.
    """

    reference: str
    policies: tuple[PolicyRow, ...]
    activations: tuple[ActivationRow, ...]
    gradients: tuple[GradientRow, ...]
    matmuls: tuple[MatmulRow, ...] = ()

    def policy(self, name: str) -> PolicyRow:
        """Returns the row of a policy.

        Args:
          name: as it was given, or as `str` writes it.

        Returns:
          Its `PolicyRow`.

        Raises:
          NumericsError: if it was not compared.

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
        """The kinds of all rows: see `ActivationRow.kind`."""
        rows = (*self.activations, *self.gradients, *self.matmuls)
        return frozenset(row.kind for row in rows)

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives everything as one list of flat dictionaries.

        Returns:
          Rows whose `"table"` is `"policy"`, `"activation"`, `"matmul"` or
          `"gradient"`.
        """
        return [
            {"table": table, **dataclasses.asdict(row)}
            for table, rows in (
                ("policy", self.policies),
                ("activation", self.activations),
                ("matmul", self.matmuls),
                ("gradient", self.gradients),
            )
            for row in rows
        ]

    def _contents(self) -> dict[str, Any]:
        return {"reference": self.reference, "rows": self.to_rows()}

    def _page(self) -> str:
        parts = [html.checkboxes(_STYLES)]
        for title, columns, cells, kinds in self._tables():
            styles = [_STYLES[kind] for kind in kinds]
            code = ("operation", "dtype")
            table = html.table(columns, cells, code=code, styles=styles, kinds=kinds)
            parts += [html.heading(title), table]
        return html.page(self._title, *parts)

    @property
    def _title(self) -> str:
        return f"Policies against {self.reference}"

    def __str__(self) -> str:
        return "\n\n".join(
            f"{title}\n{shortened_table(columns, cells, _SHOWN)}"
            for title, columns, cells, _ in self._tables()
        )

    def _tables(self) -> list[_Table]:
        layers = [
            (r.policy, r.path or "-", r.source, r.dtype, *r.figures())
            for r in self.layers
        ]
        operations = [
            (r.policy, r.operation, r.source, r.path, r.dtype, *r.figures())
            for r in self.activations
        ]
        gradients = [
            (r.policy, r.parameter, *r.figures(), percent(r.zeroed_unscaled))
            for r in self.gradients
        ]
        matmuls = [
            (
                *(r.policy, r.path, r.source),
                "backward" if r.is_backward else "forward",
                *(r.formats, f"{r.usual:.2e}", *r.figures()),
            )
            for r in self.matmuls
        ]
        policies = [r.cells() for r in self.policies]
        tables = [
            _Table(self._title, _POLICY_COLUMNS, policies, ["fine"] * len(policies)),
            _Table("Gradients", _GRADIENT_COLUMNS, gradients, _kinds(self.gradients)),
            _Table(
                "What matmuls in a smaller format add by themselves",
                _MATMUL_COLUMNS,
                matmuls,
                _kinds(self.matmuls),
            ),
            _Table("What layers return", _LAYER_COLUMNS, layers, _kinds(self.layers)),
            _Table(
                "Operations", _OPERATION_COLUMNS, operations, _kinds(self.activations)
            ),
        ]
        return [table for table in tables if table.cells]


def _kinds(
    rows: Sequence[ActivationRow] | Sequence[GradientRow] | Sequence[MatmulRow],
) -> list[str]:
    return [row.kind for row in rows]
