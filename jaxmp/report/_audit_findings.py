"""What an audit tells its user to mend, in plain words."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxmp import _sources
from jaxmp.report._audit_alignment import Misalignment
from jaxmp.report._audit_records import Collective, Matmul
from jaxmp.report._audit_widenings import Widening


class Finding(NamedTuple):
    """One thing to mend.

    Attributes:
      kind: `"upcast"`, `"matmul"`, `"collective"` or `"alignment"`.
      source: the user's line.
      path: name scopes and modules around it.
      message: what was found.
      repair: what to write instead.
    """

    kind: str
    source: _sources.Source | None
    path: str
    message: str
    repair: str

    def __str__(self) -> str:
        return f"{at(self.source)}: {self.message}. {self.repair}"


def find(
    half: str | None,
    widenings: Iterable[Widening],
    matmuls: Sequence[Matmul],
    collectives: Iterable[Collective],
    misalignments: Iterable[Misalignment],
) -> tuple[Finding, ...]:
    """Makes findings of what was recorded, the gravest kind first.

    Args:
      half: the half dtype that the program is meant for; None if it is float32.
      widenings, matmuls, collectives, misalignments: what the program has.
    """
    flops = sum(matmul.flops for matmul in matmuls)
    found = [_upcast(widening, flops) for widening in widenings]
    if half is not None:
        found += _wide_matmuls(half, matmuls)
        found += _wide_collectives(half, collectives)
    return (*found, *map(_alignment, misalignments))


def _upcast(widening: Widening, flops: int) -> Finding:
    grown = f"{_times(widening.times)}, {mib(widening.bytes)} more"
    matmuls = ""
    if widening.matmuls:
        share = widening.flops / max(flops, 1)
        matmuls = (
            f"; {counted(widening.matmuls, 'matmul')} then in float32, {share:.1%} of "
            "the FLOPs"
        )
    message = f"{widening} ({grown}{matmuls})"
    return Finding("upcast", widening.source, widening.path, message, widening.repair)


def _wide_matmuls(half: str, matmuls: Sequence[Matmul]) -> list[Finding]:
    """Matmuls that are not in the half dtype, for no reason that a widening gives."""
    groups: dict[Any, list[Matmul]] = {}
    total = max(sum(m.flops for m in matmuls), 1)
    for matmul in matmuls:
        other_half = matmul.is_half and half not in matmul.operands
        if (matmul.is_wide or other_half) and not matmul.is_widened:
            groups.setdefault((matmul.source, matmul.operands), []).append(matmul)
    found = []
    for (source, operands), members in groups.items():
        share = sum(m.flops for m in members) / total
        what = f"{members[0].operation} of {' and '.join(dict.fromkeys(operands))}"
        message = (
            f"{what} in a program meant for {half} "
            f"({_times(sum(m.times for m in members))}, {share:.1%} of the FLOPs)"
        )
        repair = (
            f"If this is not on purpose, cast both operands to {half}, or use "
            "jaxmp.apply_policy or jaxmp.autocast."
        )
        found.append(Finding("matmul", source, members[0].path, message, repair))
    return found


def _wide_collectives(half: str, collectives: Iterable[Collective]) -> list[Finding]:
    """What is sent in float32; single numbers, such as a loss, may well be."""
    return [
        Finding(
            "collective",
            c.source,
            c.path,
            f"{c.operation} sends {c.dtype}{list(c.shape)} "
            f"({_times(c.times)}, {mib(c.bytes)} on each device) in a program meant "
            f"for {half}",
            f"Cast before and after: {c.operation}(x.astype(jnp.{half})) moves "
            "half the bytes. Over many devices a sum is better kept in float32.",
        )
        for c in collectives
        if c.dtype in ("float32", "float64") and c.shape and max(c.shape) > 1
    ]


def _alignment(found: Misalignment) -> Finding:
    sizes = ", ".join(f"{d}={getattr(found.shape, d)}" for d in found.dimensions)
    repair = (
        f"Choose sizes that are multiples of 8 for a GPU, of 128 for a TPU, or pad: "
        f"{sizes}."
    )
    return Finding("alignment", found.source, found.path, str(found), repair)


def at(source: _sources.Source | None) -> str:
    """Writes a line, known or not."""
    return "an unknown line" if source is None else str(source)


def counted(count: int, noun: str) -> str:
    """Writes a number of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def mib(size: int) -> str:
    """Writes a number of bytes."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size} bytes"
