"""What a step costs on a chip, and how long it takes: estimates, not measurements.

Every operation that a chip runs on its own, most of them fusions, takes at least the
larger of two times: its matmul FLOPs over the chip's peak for their dtype, and the
bytes that it moves to and from memory over the bandwidth (Williams, Waterman and
Patterson, "Roofline", CACM 2009). On a chip on which steps were timed, it reaches a
share of these peaks, and launching it takes a while: `Chip.calibration`. Communication
between chips, and everything else, counts as free.
"""

from typing import NamedTuple

from jaxmp.report.compile.chips import Chip
from jaxmp.report.hlo._matmuls import read_matmul
from jaxmp.report.hlo._program import Computation, HloProgram, Instruction
from jaxmp.report.hlo._traffic import moved

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


class Roofline(NamedTuple):
    """An estimate of what a step costs.

    Costs are in bytes: what the chip's memory moves while the step runs. Compare steps
    on one chip by them. They are no time: most chips were never timed.

    Attributes:
      cost: of the step.
      half_cost: the same if every float32 array were half as large and every float32
        matmul as fast as a half one: the most that half precision could bring.
      matmul_cost: the part of `cost` in which matmuls take longer than memory.
      launch_cost: the part in which operations are launched; 0 where it is unknown.
      flops: of matmuls.
      bytes: moved to and from memory.
      operations: that the chip launches.
      seconds: how long the step takes; None for a chip on which no step was timed, and
        for a step of several devices.
    """

    cost: float
    half_cost: float
    matmul_cost: float
    launch_cost: float
    flops: float
    bytes: float
    operations: float
    seconds: float | None = None

    @property
    def bound(self) -> str:
        """What most of the time goes to: `"matmul"`, `"memory"` or `"launches"`."""
        parts = {"matmul": self.matmul_cost, "launches": self.launch_cost}
        parts["memory"] = self.cost - sum(parts.values())
        return max(parts, key=parts.__getitem__)

    @property
    def largest_gain(self) -> float:
        """How many times as fast half precision could make the step, at most."""
        return self.cost / self.half_cost if self.half_cost else 1.0


_Parts = tuple[float, ...]
"""Seconds at the peaks, those in half, those of matmuls; FLOPs, bytes, operations."""

_NOTHING: _Parts = (0.0,) * 6


def roofline(program: HloProgram, chip: Chip) -> Roofline:
    """Estimates what a step costs.

    Args:
      program: what is compiled.
      chip: what it is compiled for.
    """
    entry = program.computations[program.entry]
    peak, half, matmul, flops, size, operations = _computation(program, entry, chip)
    reached, launch = 1.0, 0.0
    if chip.calibration is not None:
        reached, launch = chip.calibration.share_of_peaks, chip.calibration.launch
    # What moves at the rate that is reached counts as its bytes.
    rate, launches = chip.bandwidth, operations * launch * reached
    is_timed = chip.calibration is not None
    is_alone = program.partitions * program.replicas == 1
    return Roofline(
        cost=rate * (peak + launches),
        half_cost=rate * (half + launches),
        matmul_cost=rate * matmul,
        launch_cost=rate * launches,
        flops=flops,
        bytes=size,
        operations=operations,
        seconds=peak / reached + operations * launch if is_timed and is_alone else None,
    )


def _computation(program: HloProgram, computation: Computation, chip: Chip) -> _Parts:
    total = _NOTHING
    for instruction in computation.instructions:
        is_free = instruction.opcode in _FREE or instruction.opcode.endswith("-done")
        if not is_free:
            found = _operation(program, computation, instruction, chip)
            total = tuple(a + b for a, b in zip(total, found, strict=True))
    return total


def _operation(
    program: HloProgram, computation: Computation, instruction: Instruction, chip: Chip
) -> _Parts:
    if instruction.opcode in ("while", "call", "conditional", "async-start"):
        inner = [
            _computation(program, program.computations[name], chip)
            for name in instruction.called
        ]
        longest = max(inner, default=_NOTHING, key=lambda parts: parts[0])
        trips = 1
        if instruction.opcode == "while":
            trips = program.trips(instruction, computation)
        return tuple(trips * x for x in longest)
    found = moved(program, computation, instruction)
    size = sum(one.bytes for one in found)
    half_size = sum(
        one.bytes / 2 if one.array.dtype == "f32" else one.bytes for one in found
    )
    flops, matmul, half_matmul = _matmul_seconds(
        program, computation, instruction, chip
    )
    memory, half_memory = size / chip.bandwidth, half_size / chip.bandwidth
    return (
        max(matmul, memory),
        max(half_matmul, half_memory),
        matmul if matmul > memory else 0.0,
        flops,
        size,
        1.0,
    )


def _matmul_seconds(
    program: HloProgram,
    computation: Computation,
    instruction: Instruction,
    chip: Chip,
    caller: Instruction | None = None,
) -> tuple[float, float, float]:
    """FLOPs of all matmuls in an operation, their seconds, and those in half."""
    flops, seconds, half_seconds = 0.0, 0.0, 0.0
    half = max(chip.matmul_rate("bfloat16"), chip.matmul_rate("float16"))
    if matmul := read_matmul(instruction, computation, chip.units, caller):
        rate = chip.matmul_rate(matmul.dtype, matmul.precision)
        is_wide = matmul.dtype in ("float32", "float64")
        flops = matmul.flops
        seconds = flops / rate
        half_seconds = flops / (half if is_wide else rate)
    for name in instruction.called:
        body = program.computations[name]
        for inner in body.instructions:
            found = _matmul_seconds(program, body, inner, chip, instruction)
            flops += found[0]
            seconds += found[1]
            half_seconds += found[2]
    return flops, seconds, half_seconds
