"""Matmul shapes that the hardware has to pad."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxmp._jaxpr.flops import MatmulShape
from jaxmp._jaxpr.sources import Source
from jaxmp.report.audit.records import Matmul

GPU_MULTIPLE = 8
TPU_LANES = 128


class Misalignment(NamedTuple):
    """A matmul with a dimension that is not a multiple of 8 or of 128.

    Attributes:
      operation: name of the primitive.
      shape: its `m`, `n` and `k`.
      dimensions: those that are not a multiple of 8, or, of `n` and `k`, of 128.
      gpu_waste: share of the work that is padding if `m`, `n` and `k` are padded to
        multiples of 8, which half-precision tensor cores need to run at full rate.
      tpu_waste: the same if `n` and `k` are padded to the 128 lanes of a TPU's matrix
        unit, and `m` to 8.
      flops: of all matmuls of this shape on this line.
      source: the user's line.
      path: name scopes and modules around it, where it was first seen.
    """

    operation: str
    shape: MatmulShape
    dimensions: tuple[str, ...]
    gpu_waste: float
    tpu_waste: float
    flops: int
    source: Source | None
    path: str

    def __str__(self) -> str:
        sizes = " x ".join(f"{d}={getattr(self.shape, d)}" for d in ("m", "n", "k"))
        return (
            f"{self.operation} {sizes}: {_percent(self.gpu_waste)} of the work is "
            f"padding to multiples of 8, {_percent(self.tpu_waste)} to 128"
        )


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


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"
