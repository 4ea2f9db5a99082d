"""The matrix multiplications of a compiled program, and how much they compute."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxmp.report.compile.chips import Units
from jaxmp.report.hlo._program import Computation, Instruction
from jaxmp.report.hlo._small_formats import multiplied_dtype


class HloMatmul(NamedTuple):
    """A matrix multiplication or convolution.

    Attributes:
      dtype: that is multiplied, as JAX writes it: of its operands, the wider one, or
        what a device without units for float8 or int8 converts them to.
      stored: of its operands, the wider one.
      flops: multiplications and additions.
      precision: `"default"`, `"high"` or `"highest"`.
    """

    dtype: str
    stored: str
    flops: float
    precision: str

    def __str__(self) -> str:
        is_converted = self.stored != self.dtype
        return f"{self.dtype} (stored in {self.stored})" if is_converted else self.dtype


def read_matmul(
    instruction: Instruction,
    computation: Computation,
    units: Units,
    caller: Instruction | None = None,
) -> HloMatmul | None:
    """Reads an instruction; None if it is not a matrix multiplication.

    Args:
      instruction: of any kind.
      computation: where it stands.
      units: of the device that it is compiled for.
      caller: what runs the computation; None for the entry.
    """
    target = instruction.attribute("custom_call_target")
    if instruction.opcode in ("dot", "ragged-dot"):
        contract = _dot_flops
    elif instruction.opcode == "convolution" or "conv" in target.lower():
        contract = _convolution_flops
    elif "gemm" in target or "matmul" in target.lower():
        contract = _gemm_flops
    else:
        return None
    operands = computation.operands(instruction)[:2]
    if len(operands) < 2 or not all(operand.arrays for operand in operands):
        return None
    arrays = [operand.arrays[0] for operand in operands]
    widest = max(arrays, key=lambda array: array.bits)
    precisions = instruction.attribute("operand_precision") or "default"
    # The higher precision of the two operands is what is computed in.
    precision = max(precisions.split(","), key=len)
    stored = widest.dtype_name
    dtype = multiplied_dtype(stored, instruction, caller, units)
    return HloMatmul(dtype, stored, contract(instruction, operands), precision)


def _dot_flops(instruction: Instruction, operands: Sequence[Instruction]) -> float:
    dims = operands[0].arrays[0].dims
    contracted = instruction.attribute("lhs_contracting_dims")
    depth = math.prod(dims[int(i)] for i in contracted.split(",") if i)
    return 2.0 * math.prod(instruction.arrays[0].dims) * depth


def _gemm_flops(instruction: Instruction, operands: Sequence[Instruction]) -> float:
    match = re.search(
        r'lhs_contracting_dimensions\\?":\[([^\]]*)\]', instruction.attributes
    )
    dims = operands[0].arrays[0].dims
    axes = re.findall(r"\d+", match[1]) if match else [str(len(dims) - 1)]
    depth = math.prod(dims[int(i)] for i in axes)
    return 2.0 * math.prod(instruction.arrays[0].dims) * depth


def _convolution_flops(
    instruction: Instruction, operands: Sequence[Instruction]
) -> float:
    """Counts only taps that meet an input value, not padding or a dilation's zeros.

    XLA writes batched matmuls as convolutions that are mostly padding.
    """
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if match is None:
        return 0.0
    lhs, rhs, out = (x.arrays[0].dims for x in (*operands, instruction))
    # cuDNN's gradients name the dimensions of the forward convolution.
    target = instruction.attribute("custom_call_target")
    if "BackwardInput" in target:
        lhs, out = out, lhs
    elif "BackwardFilter" in target:
        rhs, out = out, rhs
    shapes = [
        dict(zip(labels, dims, strict=False))
        for labels, dims in zip(match.groups(), (lhs, rhs, out), strict=True)
    ]
    inputs, kernel, outputs = shapes
    taps = 1
    for axis in (label for label in outputs if label.isdigit()):
        window = _window(instruction, int(axis))
        taps *= _taps(inputs[axis], kernel[axis], outputs[axis], *window)
    return 2.0 * outputs["b"] * outputs["f"] * kernel["i"] * taps


def _window(instruction: Instruction, axis: int) -> tuple[int, int, int, int]:
    """Stride, padding below, dilation of the input and of the kernel, of one axis."""
    match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(f.split("=") for f in match[1].split()) if match else {}

    def value(name: str, default: str) -> str:
        parts = fields.get(name, "").split("x")
        return parts[axis] if axis < len(parts) and parts[axis] else default

    below = int(value("pad", "0_0").split("_")[0])
    stride, base, dilation = (
        int(value(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    return stride, below, base, dilation


def _taps(
    size: int,
    kernel: int,
    outputs: int,
    stride: int,
    below: int,
    base: int,
    dilation: int,
) -> int:
    """Pairs of an output and a tap of the kernel that meet a value of the input."""
    last = (size - 1) * base
    return sum(
        0 <= place <= last and place % base == 0
        for out in range(outputs)
        for place in (out * stride + tap * dilation - below for tap in range(kernel))
    )
