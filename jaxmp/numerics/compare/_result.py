"""What `compare` found, as rows, text, JSON and a page."""

import dataclasses
import functools
import json
import math
from typing import Any

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.numbers import power
from jaxmp.errors import NumericsError

_SHOWN = 15
_POLICY_COLUMNS = (
    *("policy", "output error", "worst gradient", "loss scale"),
    *("smallest scale", "largest scale", "lost at scale 1", "lost at largest"),
)
_FIGURES = ("error", "cosine", "SNR dB", "zeroed", "not finite")
_LAYER_COLUMNS = ("policy", "layer", "source", "dtype", *_FIGURES)
_OPERATION_COLUMNS = ("policy", "operation", "source", "path", "dtype", *_FIGURES)
_GRADIENT_COLUMNS = ("policy", "parameter", *_FIGURES, "zeroed at scale 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """How far an array is from the reference.

    Attributes:
      policy: as it was given, or as `str` writes it.
      relative_error: norm of the difference over norm of the reference; infinite if a
        number came out that is not finite.
      cosine: of the angle between the two; NaN where one of them is zero.
      snr: signal-to-noise ratio in decibels: -20 log10 of the relative error.
      zeroed: which fraction of what is not zero came out as zero.
      nonfinite: how many numbers came out infinite or NaN, where the reference is not.
      size: how many numbers were compared.
    """

    policy: str
    relative_error: float
    cosine: float
    snr: float
    zeroed: float
    nonfinite: int
    size: int

    def _figures(self) -> tuple[str, ...]:
        return (
            f"{self.relative_error:.2e}",
            f"{self.cosine:.6f}",
            f"{self.snr:.1f}",
            _percent(self.zeroed),
            str(self.nonfinite or ""),
        )

    @property
    def kind(self) -> str:
        """`"nonfinite"`, `"inaccurate"` (error above 10 %), `"underflow"`, `"fine"`."""
        if self.nonfinite:
            return "nonfinite"
        if self.relative_error > _INACCURATE:
            return "inaccurate"
        return "underflow" if self.zeroed > _LOST else "fine"


_INACCURATE = 0.1
_LOST = 0.001
_MARKS = {
    "nonfinite": "bad",
    "inaccurate": "bad",
    "underflow": "note",
    "fine": "quiet",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationRow(_Row):
    """What one operation of the forward pass gave, over all iterations of loops.

    A result that is cast at once is compared after the cast.

    Attributes:
      path: name scopes and modules around it.
      operation: name of the primitive.
      file, line, function: the user's source line.
      order: place in the order of execution.
      dtype: of the result under the policy.
    """

    path: str
    operation: str
    file: str
    line: int
    function: str
    order: int
    dtype: str

    @property
    def source(self) -> str:
        """The line, for people."""
        name = self.file.rpartition("/")[2]
        return f"{name}:{self.line} ({self.function.rpartition('.')[2]})" * bool(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientRow(_Row):
    """The gradient of one parameter, after it was divided by the loss scale.

    The error of a gradient that is far below all others, such as that of a bias before
    a norm, is relative to one per cent of what is typical.

    Attributes:
      parameter: its name, such as `"params['w']"`.
      zeroed_unscaled: what `zeroed` is at loss scale 1.
    """

    parameter: str
    zeroed_unscaled: float

    @property
    def kind(self) -> str:
        """As of `ActivationRow`; what is lost at scale 1 is an underflow, too."""
        kind = super().kind
        lost = self.zeroed_unscaled > _LOST
        return "underflow" if kind == "fine" and lost else kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """What one policy does.

    Attributes:
      policy: as it was given, or as `str` writes it.
      dtype: its compute dtype.
      is_emulated: whether JAX has no arithmetic in it, so that results were rounded.
      output_error: relative error of the outputs, all of them together.
      gradient_error: the worst relative error of a parameter's gradient; None without
        gradients, and so are the following.
      loss_scale: that the gradients were computed at.
      largest_scale: the largest power of two at which nothing overflows in the backward
        pass; None for a dtype with the range of float32, and so are the following.
      smallest_scale: the smallest at which nothing becomes zero or subnormal; if it is
        above `largest_scale`, no scale keeps everything.
      lost_unscaled, lost_at_largest: which fraction of the backward pass becomes zero
        at scale 1 and at `largest_scale`.
    """

    policy: str
    dtype: str
    is_emulated: bool
    output_error: float
    gradient_error: float | None
    loss_scale: float | None
    largest_scale: float | None
    smallest_scale: float | None
    lost_unscaled: float | None
    lost_at_largest: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        wanted, given = self.gradient_error, self.lost_at_largest
        return (
            self.policy + " (emulated)" * self.is_emulated,
            f"{self.output_error:.2e}",
            "-" if wanted is None else f"{wanted:.2e}",
            *map(_scale, (self.loss_scale, self.smallest_scale, self.largest_scale)),
            *("-" if x is None else _percent(x) for x in (self.lost_unscaled, given)),
        )


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
            ((r.policy, r.path or "-", r.source, r.dtype, *r._figures()), r.kind)
            for r in self.layers
        ]
        operations = [
            (
                (r.policy, r.operation, r.source, r.path, r.dtype, *r._figures()),
                r.kind,
            )
            for r in self.activations
        ]
        gradients = [
            (
                (r.policy, r.parameter, *r._figures(), _percent(r.zeroed_unscaled)),
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


def _percent(fraction: float) -> str:
    if not fraction:
        return ""
    return "<0.1 %" if fraction < 0.001 else f"{100 * fraction:.1f} %"


def _scale(scale: float | None) -> str:
    return "-" if scale is None else power(scale)


def _plain(value: Any) -> Any:
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
