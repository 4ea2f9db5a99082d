"""What a compiled program consists of: matmuls, converts and collectives by dtype."""

import collections
from collections.abc import Mapping
from typing import NamedTuple

from jaxmp.report.hlo._hlo import HloProgram, walk
from jaxmp.report.hlo._matmuls import read_matmul

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Total(NamedTuple):
    """How often something runs, and how much of it there is.

    Attributes:
      times: how often it runs in a step.
      amount: FLOPs of matmuls, bytes of collectives, elements of converts.
    """

    times: int
    amount: float


class Contents(NamedTuple):
    """What a program runs in a step, loops counted as often as they run.

    Attributes:
      matmuls: FLOPs by dtype of the operands.
      converts: elements by `"float32 -> bfloat16"`.
      collectives: bytes by `"all-reduce bfloat16"`, on one device.
    """

    matmuls: Mapping[str, Total]
    converts: Mapping[str, Total]
    collectives: Mapping[str, Total]


def read_contents(program: HloProgram) -> Contents:
    """Counts what a program runs."""
    matmuls: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    converts: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    collectives: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for step in walk(program):
        instruction, times = step.instruction, step.times
        if matmul := read_matmul(instruction, step.computation):
            matmuls[matmul.dtype].append((times, times * matmul.flops))
        elif instruction.opcode == "convert":
            operands = step.computation.operands(instruction)
            if operands and operands[0].arrays:
                old, new = operands[0].arrays[0], instruction.arrays[0]
                elements = new.size * 8 // new.bits if new.bits else 0
                name = f"{old.dtype_name} -> {new.dtype_name}"
                converts[name].append((times, times * elements))
        elif instruction.opcode.removesuffix("-start") in COLLECTIVES:
            kind = instruction.opcode.removesuffix("-start")
            for array in step.computation.results(instruction):
                name = f"{kind} {array.dtype_name}"
                collectives[name].append((times, times * array.size))
    return Contents(*map(_totals, (matmuls, converts, collectives)))


def _totals(found: Mapping[str, list[tuple[int, float]]]) -> dict[str, Total]:
    totals = {
        name: Total(sum(n for n, _ in seen), sum(amount for _, amount in seen))
        for name, seen in found.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].amount))
