"""Matmul shapes that the hardware has to pad."""

import math
from collections.abc import Iterable

from jaxmp._jaxpr.flops import MatmulShape
from jaxmp._jaxpr.sources import Source
from jaxmp.report.audit.records import Matmul, Misalignment

GPU_MULTIPLE = 8
TPU_LANES = 128


def misalignments(matmuls: Iterable[Matmul]) -> tuple[Misalignment, ...]:
    """Lists the shapes that do not fit, the most wasteful first.

    Args:
      matmuls: those of a program. Backward ones have the dimensions of forward ones in
        another order, and are left out if there are forward ones.
    """
    matmuls = list(matmuls)
    forward = [m for m in matmuls if not m.is_backward]
    groups: dict[tuple[MatmulShape, Source | None], list[Matmul]] = {}
    for matmul in forward or matmuls:
        groups.setdefault((matmul.shape, matmul.source), []).append(matmul)
    found = [
        Misalignment(
            operation=members[0].operation,
            shape=shape,
            dimensions=dimensions,
            gpu_waste=waste(shape, GPU_MULTIPLE, GPU_MULTIPLE, GPU_MULTIPLE),
            tpu_waste=waste(shape, GPU_MULTIPLE, TPU_LANES, TPU_LANES),
            flops=sum(m.flops for m in members),
            source=source,
            path=members[0].path,
        )
        for (shape, source), members in groups.items()
        if (dimensions := _misaligned(shape))
    ]
    return tuple(sorted(found, key=_wasted, reverse=True))


def _wasted(found: Misalignment) -> float:
    return found.flops * (found.gpu_waste + found.tpu_waste)


def waste(shape: MatmulShape, m: int, n: int, k: int) -> float:
    """Share of a matmul, padded to multiples of `m`, `n` and `k`, that is padding."""
    padded = math.prod(
        -(-size // multiple) * multiple
        for size, multiple in ((shape.m, m), (shape.n, n), (shape.k, k))
    )
    return 1 - shape.m * shape.n * shape.k / padded if padded else 0.0


def _misaligned(shape: MatmulShape) -> tuple[str, ...]:
    multiples = {"m": GPU_MULTIPLE, "n": TPU_LANES, "k": TPU_LANES}
    return tuple(d for d, unit in multiples.items() if getattr(shape, d) % unit)
