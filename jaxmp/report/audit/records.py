"""What an audit lists: its findings, and the records that they are made of."""

from typing import NamedTuple

from jaxmp._jaxpr.calls import LOOPS
from jaxmp._jaxpr.flops import MatmulShape
from jaxmp._jaxpr.primitives import SCALED_DOT
from jaxmp._jaxpr.sources import Source
from jaxmp._jaxpr.sums import SCATTER


class Finding(NamedTuple):
    """One thing to mend.

    Attributes:
      kind: `"accumulation"`, `"upcast"`, `"matmul"`, `"collective"` or `"alignment"`;
        of a compiled step `"gathered-in-float32"` or `"reduced-in-half"`.
      source: the user's line.
      path: name scopes and modules around it.
      message: what was found.
      repair: what to write instead.
    """

    kind: str
    source: Source | None
    path: str
    message: str
    repair: str

    def __str__(self) -> str:
        return f"{at(self.source)}: {self.message}. {self.repair}"

    @property
    def paragraph(self) -> str:
        """The finding in three lines."""
        inside = f" in {self.path}" if self.path else ""
        return (
            f"{self.kind}: {self.message}\n"
            f"  at {at(self.source)}{inside}\n"
            f"  {self.repair}"
        )


class Widening(NamedTuple):
    """A half value that becomes float32 because of another operand.

    Attributes:
      source: the user's line.
      path: name scopes and modules around it, where it was first seen.
      dtype: the half dtype that was lost.
      shape: of the value, where it was first seen.
      culprit: the operand that did it, in words.
      kind: `"scalar"`, `"constant"`, `"argument"`, `"computed"`, `"cast"`, `"layer"` or
        `"mixed"`: what kind of operand that is.
      times: how often the line does so, loops included.
      bytes: by how much all those values grow, and those that follow from them.
      matmuls: how many matmuls run in float32 because of it.
      flops: what these matmuls compute.
      repair: what to write instead.
    """

    source: Source | None
    path: str
    dtype: str
    shape: tuple[int, ...]
    culprit: str
    kind: str
    times: int
    bytes: int
    matmuls: int
    flops: int
    repair: str

    def __str__(self) -> str:
        return (
            f"{self.dtype}{list(self.shape)} becomes float32 because of {self.culprit}"
        )


class Matmul(NamedTuple):
    """A matmul or convolution.

    Attributes:
      operation: name of the primitive; `"scaled_dot"` is a matmul of operands that
        were rounded to float8 or int8 under scales.
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

    @property
    def is_quantized(self) -> bool:
        """Whether both operands were rounded to float8 or int8, under scales."""
        return self.operation == SCALED_DOT


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


class Accumulation(NamedTuple):
    """A sum whose accumulator has too few bits for its number of terms.

    Attributes:
      operation: the primitive: `"scan"` and `"while"` for what a loop carries, `"add"`
        for additions in a row.
      dtype: of the accumulator.
      shape: of the accumulator.
      terms: how many terms an element has; None in a `while`, whose number of
        iterations is unknown.
      largest_safe: how many equal positive terms the dtype can add up: 2^p for p bits.
      times: how often the sum is made.
      source: the user's line.
      path: name scopes and modules around it.
      is_backward: whether it is part of a backward pass.
      under: `"autocast"`, `"full_precision"` or `"apply_policy"` if it is inside one.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    terms: int | None
    largest_safe: int
    times: int
    source: Source | None
    path: str
    is_backward: bool
    under: str

    @property
    def is_sequential(self) -> bool:
        """Whether the terms are added one after the other, whatever compiles it."""
        return self.operation in (*LOOPS, "add", SCATTER)

    def __str__(self) -> str:
        what = _WRITTEN.get(self.operation, f"{self.operation} of")
        terms = "an unknown number of" if self.terms is None else f"{self.terms}"
        many = "up to " if self.operation == SCATTER else ""
        return (
            f"accumulates in half: {what} {many}{terms} terms in {self.dtype}"
            f"{list(self.shape)}, which holds {self.largest_safe} equal ones"
        )


_WRITTEN = {
    **dict.fromkeys(LOOPS, "a loop that carries the sum of"),
    "add": "additions in a row, of",
}


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


class Residual(NamedTuple):
    """An array that the forward pass computes and the backward pass reads.

    Attributes:
      dtype: its dtype.
      shape: its shape; of a loop, that of all iterations together.
      bytes: its size.
      source: the user's line that computes it.
      path: name scopes and modules around it.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    source: Source | None
    path: str


def at(source: Source | None) -> str:
    """Writes a line, known or not."""
    return "an unknown line" if source is None else str(source)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"
