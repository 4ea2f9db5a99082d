"""What an audit found, as text, rows, JSON and a page."""

import collections
import dataclasses
import functools
import json
from typing import Any

from jaxmp._jaxpr import sources as _sources
from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp._views.numbers import counted, mib
from jaxmp.report.audit._accumulations import Accumulation
from jaxmp.report.audit._alignment import Misalignment
from jaxmp.report.audit._findings import Finding, find
from jaxmp.report.audit._residuals import Residual
from jaxmp.report.audit._widenings import Widening
from jaxmp.report.audit.records import Collective, Matmul, at

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
_MARKS = {
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
class Audit:
    """What `audit` found in a program.

    Attributes:
      half: the half dtype that the program is meant to compute in; None if it is meant
        to be float32 throughout.
      matmuls: every matmul and convolution, in order.
      widenings: every silent widening, the costliest first.
      residuals: what is kept for the backward pass, the largest first; None if the
        program has no derivative.
      collectives: every communication inside of `jax.shard_map`.
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
        """Share of the matmul FLOPs that run in half, between 0 and 1."""
        half = sum(matmul.flops for matmul in self.matmuls if matmul.is_half)
        return half / max(self.flops, 1)

    @property
    def residual_bytes(self) -> dict[str, int]:
        """Bytes kept for the backward pass, by dtype."""
        sizes = collections.Counter[str]()
        for residual in self.residuals or ():
            sizes[residual.dtype] += residual.bytes
        return dict(sizes)

    @functools.cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What to mend, what costs most first.

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
        told = ", ".join(counted(counts[k], k) for k in _MARKS if counts[k])
        kept = ", ".join(
            f"{mib(size)} {dtype}" for dtype, size in self.residual_bytes.items()
        )
        return (
            f"meant for {self.half or 'float32'} | {self.flops / 1e9:.4g} GFLOPs in "
            f"matmuls, {self.half_flops:.1%} in half | kept for the backward pass: "
            f"{kept or 'nothing'} | findings: {told or 'none'}"
        )

    def __str__(self) -> str:
        parts = [self.summary, *map(_paragraph, self.findings)]
        for columns, rows in self._tables():
            if rows:
                parts.append(_table.text_table(columns, rows))
        return "\n\n".join(parts)

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
        kept = [
            (f"{r.bytes / 2**20:.1f}", r.dtype, list(r.shape), at(r.source), r.path)
            for r in (self.residuals or ())[:_MOST_RESIDUALS]
        ]
        return [
            (_MATMUL_COLUMNS, _matmul_rows(self)),
            (_RESIDUAL_COLUMNS, kept),
        ]

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives everything that was found as one list of flat dictionaries.

        Returns:
          A row for each finding, matmul, residual and collective; `"table"` tells which
          of these it is. All values are strings, numbers, booleans and lists.
        """
        return [
            {"table": table, **{k: _plain(v) for k, v in row._asdict().items()}}
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

    def to_json(self) -> str:
        """Gives the figures and all rows as JSON."""
        figures = {
            "half": self.half,
            "flops": self.flops,
            "half_flops": self.half_flops,
            "residual_bytes": self.residual_bytes,
            "kinds": sorted(self.kinds),
        }
        return json.dumps({**figures, "rows": self.to_rows()}, indent=1)

    def to_html(self, path: Any) -> None:
        """Writes one self-contained page.

        Args:
          path: file to write.
        """
        kinds = [finding.kind for finding in self.findings]
        rows = [
            (f.kind, at(f.source), f.path, f.message, f.repair) for f in self.findings
        ]
        shown = [kind for kind in _MARKS if kind in kinds]
        page = _html.page(
            "Audit of dtypes",
            _html.paragraph(self.summary),
            _html.checkboxes(shown),
            _html.table(
                _FINDING_COLUMNS,
                rows,
                styles=[_MARKS[kind] for kind in kinds],
                kinds=kinds,
            ),
            *(_html.table(columns, rows) for columns, rows in self._tables() if rows),
        )
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)


def _paragraph(finding: Finding) -> str:
    inside = f" in {finding.path}" if finding.path else ""
    return (
        f"{finding.kind}: {finding.message}\n"
        f"  at {at(finding.source)}{inside}\n"
        f"  {finding.repair}"
    )


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


def _plain(value: Any) -> Any:
    if isinstance(value, _sources.Source):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
