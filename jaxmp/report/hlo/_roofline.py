"""How long a step takes at least: an estimate from peaks, not a measurement.

Every operation that a chip runs on its own, most of them fusions, takes at least the
larger of two times: its matmul FLOPs over the chip's peak for their dtype, and the
bytes that it moves to and from memory over the bandwidth (Williams, Waterman and
Patterson, "Roofline", CACM 2009). Communication between chips, and everything that is
neither a matmul nor memory traffic, counts as free.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxmp.report.compile.chips import Chip
from jaxmp.report.hlo._matmuls import read_matmul
from jaxmp.report.hlo._program import Computation, HloArray, HloProgram, Instruction

_FREE = (
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
)
_SLICES = ("dynamic-slice", "gather", "slice")


class Roofline(NamedTuple):
    """An estimate of a step's time.

    Attributes:
      seconds: how long the step takes at least.
      matmul_seconds: the part in which matmuls take longer than memory.
      flops: of matmuls.
      bytes: moved to and from memory.
      half_seconds: the same if every float32 array were half as large and every
        float32 matmul as fast as a half one: the most that half precision could bring.
    """

    seconds: float
    matmul_seconds: float
    flops: float
    bytes: float
    half_seconds: float

    @property
    def bound(self) -> str:
        """What most of the time goes to: `"matmul"` or `"memory"`."""
        return "matmul" if 2 * self.matmul_seconds > self.seconds else "memory"

    @property
    def largest_gain(self) -> float:
        """How many times as fast half precision could make the step, at most."""
        return self.seconds / self.half_seconds if self.half_seconds else 1.0


_NOTHING = Roofline(0.0, 0.0, 0.0, 0.0, 0.0)


def roofline(program: HloProgram, chip: Chip) -> Roofline:
    """Estimates the time of a step.

    Args:
      program: what is compiled.
      chip: what it is compiled for.
    """
    return _computation(program, program.computations[program.entry], chip)


def _computation(program: HloProgram, computation: Computation, chip: Chip) -> Roofline:
    total = _NOTHING
    for instruction in computation.instructions:
        is_free = instruction.opcode in _FREE or instruction.opcode.endswith("-done")
        if not is_free:
            found = _operation(program, computation, instruction, chip)
            total = Roofline(*(a + b for a, b in zip(total, found, strict=True)))
    return total


def _operation(
    program: HloProgram, computation: Computation, instruction: Instruction, chip: Chip
) -> Roofline:
    if instruction.opcode in ("while", "call", "conditional", "async-start"):
        inner = [
            _computation(program, program.computations[name], chip)
            for name in instruction.called
        ]
        longest = max(inner, default=_NOTHING, key=lambda r: r.seconds)
        trips = 1
        if instruction.opcode == "while":
            trips = program.trips(instruction, computation)
        return Roofline(*(trips * x for x in longest))
    moved = _moved(program, computation, instruction)
    size = sum(n for _, n in moved)
    half_size = sum(n / 2 if a.dtype == "f32" else n for a, n in moved)
    flops, matmul, half_matmul = _matmul_seconds(
        program, computation, instruction, chip
    )
    memory, half_memory = size / chip.bandwidth, half_size / chip.bandwidth
    seconds = max(matmul, memory)
    return Roofline(
        seconds=seconds,
        matmul_seconds=matmul if matmul > memory else 0.0,
        flops=flops,
        bytes=size,
        half_seconds=max(half_matmul, half_memory),
    )


def _matmul_seconds(
    program: HloProgram, computation: Computation, instruction: Instruction, chip: Chip
) -> tuple[float, float, float]:
    """FLOPs of all matmuls in an operation, their seconds, and those in half."""
    flops, seconds, half_seconds = 0.0, 0.0, 0.0
    half = max(chip.matmul_rate("bfloat16"), chip.matmul_rate("float16"))
    if matmul := read_matmul(instruction, computation):
        rate = chip.matmul_rate(matmul.dtype, matmul.precision)
        is_wide = matmul.dtype in ("float32", "float64")
        flops = matmul.flops
        seconds = flops / rate
        half_seconds = flops / (half if is_wide else rate)
    for name in instruction.called:
        body = program.computations[name]
        for inner in body.instructions:
            found = _matmul_seconds(program, body, inner, chip)
            flops += found[0]
            seconds += found[1]
            half_seconds += found[2]
    return flops, seconds, half_seconds


def _moved(
    program: HloProgram, computation: Computation, instruction: Instruction
) -> list[tuple[HloArray, float]]:
    """The arrays that an operation reads and writes in memory, with bytes of each."""
    if instruction.opcode in _SLICES:
        results = [(array, 2.0 * array.size) for array in instruction.arrays]
        return [(array, size) for array, size in results if not array.is_on_chip]
    reads = [
        (array, min(float(array.size), part))
        for operand, part in zip(
            computation.operands(instruction),
            _parts_read(program, computation, instruction),
            strict=True,
        )
        for array in operand.arrays
    ]
    written = _written(program, computation, instruction)
    writes = [(array, float(array.size)) for array in written]
    return [(array, size) for array, size in reads + writes if not array.is_on_chip]


def _parts_read(
    program: HloProgram, computation: Computation, instruction: Instruction
) -> list[float]:
    """Bytes of each operand that are read: all, or the slices that a fusion takes."""
    operands = computation.operands(instruction)
    everything = [float("inf")] * len(operands)
    if instruction.opcode == "dynamic-update-slice":
        return [0.0, *everything[1:]]
    if instruction.opcode != "fusion" or not instruction.called:
        return everything
    body = program.computations[instruction.called[0]]
    parts = list(everything)
    for parameter in body.instructions:
        if parameter.opcode == "parameter":
            users = [i for i in body.instructions if parameter.name in i.operands]
            if users and all(_reads_a_part(user, parameter) for user in users):
                parts[int(parameter.arguments)] = float(
                    sum(a.size for u in users if u.opcode in _SLICES for a in u.arrays)
                )
    return parts


def _reads_a_part(user: Instruction, parameter: Instruction) -> bool:
    is_first = user.operands[0] == parameter.name
    return is_first and user.opcode in (*_SLICES, "dynamic-update-slice")


def _written(
    program: HloProgram, computation: Computation, instruction: Instruction
) -> Sequence[HloArray]:
    """The arrays that an operation writes: for an update, the part that is new."""
    body, root = computation, instruction
    if instruction.opcode == "fusion" and instruction.called:
        body = program.computations[instruction.called[0]]
        root = body.result
    if root.opcode == "dynamic-update-slice":
        return body.operands(root)[1].arrays
    return computation.results(instruction)
