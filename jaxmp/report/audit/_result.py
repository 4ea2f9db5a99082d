"""`Audit`: what an audit found, as text, rows, JSON and a page."""

import collections
import dataclasses
import functools
from typing import Any

from jaxmp._jaxpr.sources import Source
from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.numbers import MIB, counted, mib
from jaxmp._views.result import Result
from jaxmp.report.audit._findings import find
from jaxmp.report.audit.records import (
    Accumulation,
    Collective,
    Finding,
    Matmul,
    Misalignment,
    Residual,
    Widening,
    at,
)

_SHORT = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
}
_STYLES = {
    "upcast": "bad",
    "matmul": "bad",
    "accumulation": "bad",
    "collective": "note",
    "alignment": "quiet",
}
_FINDING_COLUMNS = ("kind", "source", "path", "what", "repair")
_MATMUL_COLUMNS = (
    "matmul", "count", "dtypes", "GFLOPs", "share", "pass", "source", "path",
)  # fmt: skip
_RESIDUAL_COLUMNS = ("MiB", "dtype", "shape", "source", "path")
_MOST_RESIDUALS = 10


@dataclasses.dataclass(frozen=True)
class Audit(Result):
    """What `audit` found in a program.

    Attributes:
      half: the half dtype that the program is meant to compute in; None if it is meant
        to be float32 throughout.
      matmuls: every matmul and convolution, in order.
      widenings: every silent widening, the costliest first.
      residuals: what is kept for the backward pass, the largest first; None if the
        program has no derivative.
      collectives: every communication inside `jax.shard_map`.
      misalignments: shapes that do not fit the hardware, the most wasteful first.
      accumulations: sums that are too long for their half accumulator, the longest
        first.
    """

    half: str | None
    matmuls: tuple[Matmul, ...]
    widenings: tuple[Widening, ...]
    residuals: tuple[Residual, ...] | None
    collectives: tuple[Collective, ...]
    misalignments: tuple[Misalignment, ...]
    accumulations: tuple[Accumulation, ...] = ()

    @property
    def flops(self) -> int:
        """What all matmuls compute."""
        return sum(matmul.flops for matmul in self.matmuls)

    @property
    def half_flops(self) -> float:
        """Share of the matmul FLOPs that run in half, between 0 and 1.

        Those that run in a smaller format, under scales, count too.
        """
        half = sum(m.flops for m in self.matmuls if m.is_half or m.is_quantized)
        return half / max(self.flops, 1)

    @property
    def quantized_flops(self) -> float:
        """Share of the matmul FLOPs that run in float8 or int8, under scales."""
        quantized = sum(matmul.flops for matmul in self.matmuls if matmul.is_quantized)
        return quantized / max(self.flops, 1)

    @property
    def residual_bytes(self) -> dict[str, int]:
        """Bytes kept for the backward pass, by dtype."""
        sizes = collections.Counter[str]()
        for residual in self.residuals or ():
            sizes[residual.dtype] += residual.bytes
        return dict(sizes)

    @functools.cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What to mend, the costliest first.

        Sums that lose their terms come before what is only slow: upcasts and matmuls by
        their FLOPs, collectives by their bytes, and alignments.
        """
        return find(
            self.half,
            self.widenings,
            self.matmuls,
            self.collectives,
            self.misalignments,
            self.accumulations,
        )

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of the findings."""
        return frozenset(finding.kind for finding in self.findings)

    @property
    def summary(self) -> str:
        """The figures in one line."""
        counts = collections.Counter(finding.kind for finding in self.findings)
        kinds = ", ".join(counted(counts[k], k) for k in _STYLES if counts[k])
        kept = ", ".join(
            f"{mib(size)} {dtype}" for dtype, size in self.residual_bytes.items()
        )
        smaller = ""
        if self.quantized_flops:
            smaller = f", {self.quantized_flops:.1%} in a smaller format"
        return (
            f"meant for {self.half or 'float32'} | {self.flops / 1e9:.4g} GFLOPs in "
            f"matmuls, {self.half_flops:.1%} in half{smaller} | kept for the backward "
            f"pass: {kept or 'nothing'} | findings: {kinds or 'none'}"
        )

    def __str__(self) -> str:
        parts = [self.summary, *(found.paragraph for found in self.findings)]
        for columns, rows in self._tables():
            if rows:
                parts.append(_table.text_table(columns, rows))
        return "\n\n".join(parts)

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives everything that was found as one list of flat dictionaries.

        Returns:
          A row for each finding, matmul, residual and so on; `"table"` says which of
          these it is. All values are strings, numbers, booleans and lists.
        """
        return [
            {"table": table, **{k: _cell(v) for k, v in row._asdict().items()}}
            for table, rows in (
                ("finding", self.findings),
                ("widening", self.widenings),
                ("matmul", self.matmuls),
                ("residual", self.residuals or ()),
                ("collective", self.collectives),
                ("misalignment", self.misalignments),
                ("accumulation", self.accumulations),
            )
            for row in rows
        ]

    def _contents(self) -> dict[str, Any]:
        return {
            "half": self.half,
            "flops": self.flops,
            "half_flops": self.half_flops,
            "quantized_flops": self.quantized_flops,
            "residual_bytes": self.residual_bytes,
            "kinds": sorted(self.kinds),
            "rows": self.to_rows(),
        }

    def _page(self) -> str:
        kinds = [finding.kind for finding in self.findings]
        rows = [
            (f.kind, at(f.source), f.path, f.message, f.repair) for f in self.findings
        ]
        return _html.page(
            "Audit of dtypes",
            _html.paragraph(self.summary),
            _html.checkboxes(kind for kind in _STYLES if kind in kinds),
            _html.table(
                _FINDING_COLUMNS,
                rows,
                styles=[_STYLES[kind] for kind in kinds],
                kinds=kinds,
            ),
            *(_html.table(columns, rows) for columns, rows in self._tables() if rows),
        )

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
        kept = [
            (f"{r.bytes / MIB:.1f}", r.dtype, list(r.shape), at(r.source), r.path)
            for r in (self.residuals or ())[:_MOST_RESIDUALS]
        ]
        return [(_MATMUL_COLUMNS, _matmul_rows(self)), (_RESIDUAL_COLUMNS, kept)]


def _matmul_rows(audit: Audit) -> list[tuple[Any, ...]]:
    """Matmuls of one line, shape and dtype in one row, the largest share first."""
    groups: dict[Any, list[Matmul]] = {}
    for m in audit.matmuls:
        key = m.source, m.operation, m.operands, m.output, m.shape, m.is_backward
        groups.setdefault(key, []).append(m)
    rows = []
    for members in sorted(groups.values(), key=lambda g: -sum(m.flops for m in g)):
        first, flops = members[0], sum(m.flops for m in members)
        lhs, rhs, out = (_SHORT.get(d, d) for d in (*first.operands, first.output))
        rows.append(
            (
                f"{first.operation} {first.shape}",
                sum(m.times for m in members),
                f"{lhs} {rhs} -> {out}",
                f"{flops / 1e9:.4g}",
                f"{flops / max(audit.flops, 1):.1%}",
                "backward" if first.is_backward else "forward",
                at(first.source),
                first.path,
            )
        )
    return rows


def _cell(value: Any) -> Any:
    """A field of a record for a row: a line as a string, a shape as a list."""
    if isinstance(value, Source):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
