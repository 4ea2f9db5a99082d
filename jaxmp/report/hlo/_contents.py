"""What a compiled program consists of: matmuls, converts and collectives by dtype."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxmp.report.hlo._matmuls import read_matmul
from jaxmp.report.hlo._program import HloProgram, walk

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
    """What a program runs in a step; a loop counts as often as it runs.

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
    matmuls: dict[str, Total] = {}
    converts: dict[str, Total] = {}
    collectives: dict[str, Total] = {}
    for step in walk(program):
        instruction, times = step.instruction, step.times
        if matmul := read_matmul(instruction, step.computation):
            _add(matmuls, matmul.dtype, times, matmul.flops)
        elif instruction.opcode == "convert":
            operands = step.computation.operands(instruction)
            if operands and operands[0].arrays:
                old, new = operands[0].arrays[0], instruction.arrays[0]
                elements = new.size * 8 // new.bits if new.bits else 0
                name = f"{old.dtype_name} -> {new.dtype_name}"
                _add(converts, name, times, elements)
        elif (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
            for array in step.computation.results(instruction):
                _add(collectives, f"{kind} {array.dtype_name}", times, array.size)
    return Contents(
        matmuls=_sorted(matmuls),
        converts=_sorted(converts),
        collectives=_sorted(collectives),
    )


def _add(totals: dict[str, Total], name: str, times: int, amount: float) -> None:
    before = totals.get(name, Total(0, 0))
    totals[name] = Total(before.times + times, before.amount + times * amount)


def _sorted(totals: Mapping[str, Total]) -> dict[str, Total]:
    return dict(sorted(totals.items(), key=lambda item: -item[1].amount))
