"""The matmuls and collectives of a program, as the audit lists them."""

from typing import NamedTuple

from jaxmp._jaxpr.flops import MatmulShape
from jaxmp._jaxpr.sources import Source


class Matmul(NamedTuple):
    """A matmul or convolution.

    Attributes:
      operation: name of the primitive.
      operands: the dtypes of its two operands.
      output: the dtype in which it accumulates and returns.
      shape: its `m`, `n` and `k`, with `batch` and `taps`.
      times: how often it runs, in loops and on several devices.
      flops: of all these times.
      source: the user's line.
      path: name scopes and modules around it.
      is_backward: whether it is part of a backward pass.
      is_widened: whether it runs in float32 because of a silent widening.
      under: `"autocast"`, `"full_precision"` or `"apply_policy"` if it is inside one.
      library: the package whose code it is, such as `"flax"`; empty for the user's
        own.
    """

    operation: str
    operands: tuple[str, str]
    output: str
    shape: MatmulShape
    times: int
    flops: int
    source: Source | None
    path: str
    is_backward: bool
    is_widened: bool
    under: str
    library: str

    @property
    def is_wide(self) -> bool:
        """Whether it computes in float32 or wider."""
        return any(dtype in ("float32", "float64") for dtype in self.operands)

    @property
    def is_half(self) -> bool:
        """Whether both operands are float16 or bfloat16."""
        return all(dtype in ("float16", "bfloat16") for dtype in self.operands)


class Collective(NamedTuple):
    """A communication between devices.

    Attributes:
      operation: name of the primitive.
      dtype: of what is sent.
      shape: of the operand on one device.
      bytes: of the operand on one device, for all the times that it runs.
      times: how often it runs.
      source: the user's line.
      path: name scopes and modules around it.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    source: Source | None
    path: str


def at(source: Source | None) -> str:
    """Writes a line, known or not."""
    return "an unknown line" if source is None else str(source)
