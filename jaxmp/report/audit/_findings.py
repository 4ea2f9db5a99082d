"""What an audit asks its user to mend, in plain words."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxmp._views.numbers import counted, mib
from jaxmp.report.audit._advice import matmul_repair, sum_repair
from jaxmp.report.audit.records import (
    Accumulation,
    Collective,
    Finding,
    Matmul,
    Misalignment,
    Widening,
)

# A matmul of fewer FLOPs takes no longer on an accelerator than it takes to start one.
_TINY = 10**8


def find(
    half: str | None,
    widenings: Iterable[Widening],
    matmuls: Sequence[Matmul],
    collectives: Iterable[Collective],
    misalignments: Sequence[Misalignment],
    accumulations: Iterable[Accumulation],
) -> tuple[Finding, ...]:
    """Makes findings of what was recorded, the costliest first.

    Args:
      half: the half dtype that the program is meant for; None if it is float32.
      widenings, matmuls, collectives, misalignments, accumulations: what the program
        has.
    """
    flops = sum(matmul.flops for matmul in matmuls)
    slow = [(w.flops, _upcast(w, flops)) for w in widenings]
    if half is not None:
        slow += _wide_matmuls(half, matmuls)
    slow.sort(key=lambda item: -item[0])
    found = [finding for _, finding in slow]
    if half is not None:
        found += _wide_collectives(half, collectives)
    return (
        *map(_accumulation, accumulations),
        *found,
        *_alignments(misalignments),
    )


def _accumulation(found: Accumulation) -> Finding:
    meaning = "from there on, sum + term rounds to the sum"
    if not found.is_sequential:
        meaning += ", unless the compiler keeps more bits than are asked for"
    way = ", in the backward pass" if found.is_backward else ""
    message = f"{found}: {meaning} ({_times(found.times)}{way})"
    repair = sum_repair(found)
    return Finding("accumulation", found.source, found.path, message, repair)


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


def _wide_matmuls(half: str, matmuls: Sequence[Matmul]) -> list[tuple[int, Finding]]:
    """Matmuls that are not in the half dtype, for another reason than a widening."""
    groups: dict[Any, list[Matmul]] = {}
    total = max(sum(m.flops for m in matmuls), 1)
    has_policy = any(matmul.under == "apply_policy" for matmul in matmuls)
    for matmul in matmuls:
        other_half = matmul.is_half and half not in matmul.operands
        if (matmul.is_wide or other_half) and not matmul.is_widened:
            groups.setdefault((matmul.source, matmul.operands), []).append(matmul)
    found = []
    for (source, operands), members in groups.items():
        flops = sum(m.flops for m in members)
        what = f"{members[0].operation} of {' and '.join(dict.fromkeys(operands))}"
        message = (
            f"{what} in a program meant for {half} "
            f"({_times(sum(m.times for m in members))}, {flops / total:.1%} of the "
            "FLOPs)"
        )
        first = members[0]
        repair = matmul_repair(first, half, has_policy)
        found.append((flops, Finding("matmul", source, first.path, message, repair)))
    return found


def _wide_collectives(half: str, collectives: Iterable[Collective]) -> list[Finding]:
    """What is sent in float32; single numbers, such as a loss, may well be."""
    sent = [
        c
        for c in collectives
        if c.dtype in ("float32", "float64") and c.shape and max(c.shape) > 1
    ]
    return [
        Finding(
            kind="collective",
            source=c.source,
            path=c.path,
            message=f"{c.operation} sends {c.dtype}{list(c.shape)} "
            f"({_times(c.times)}, {mib(c.bytes)} on each device) in a program meant "
            f"for {half}",
            repair=f"Cast before and after: {c.operation}(x.astype(jnp.{half})) moves "
            "half the bytes. Over many devices a sum is better kept in float32.",
        )
        for c in sorted(sent, key=lambda c: -c.bytes)
    ]


def _alignments(found: Sequence[Misalignment]) -> list[Finding]:
    """One finding for each shape that is padded, and one for all that are tiny."""
    tiny = [m for m in found if m.shape.flops < _TINY]
    large = [_alignment(m) for m in found if m.shape.flops >= _TINY]
    if not tiny:
        return large
    first = tiny[0]
    largest = max(m.shape.flops for m in tiny) / 1e6
    shapes = counted(len(tiny), "shape")
    message = (
        f"{shapes} of small matmuls (at most {largest:.2g} MFLOPs) that the hardware "
        f"pads, such as {first}"
    )
    repair = (
        "At this size padding costs next to nothing: starting a kernel takes longer."
    )
    return [*large, Finding("alignment", first.source, first.path, message, repair)]


def _alignment(found: Misalignment) -> Finding:
    sizes = ", ".join(f"{d}={getattr(found.shape, d)}" for d in found.dimensions)
    repair = (
        f"Choose sizes that are multiples of 8 for a GPU, of 128 for a TPU, or pad: "
        f"{sizes}."
    )
    return Finding("alignment", found.source, found.path, str(found), repair)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
