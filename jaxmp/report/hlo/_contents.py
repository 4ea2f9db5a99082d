"""What a compiled program consists of: matmuls, converts and collectives by dtype."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxmp.report.compile.chips import Units
from jaxmp.report.hlo._collectives import Collective, Line, Transfer, total
from jaxmp.report.hlo._matmuls import read_matmul
from jaxmp.report.hlo._program import HloProgram
from jaxmp.report.hlo._steps import walk


class Total(NamedTuple):
    """How often something runs, and how much of it there is.

    Attributes:
      times: how often it runs in a step.
      amount: FLOPs of matmuls, elements of converts.
    """

    times: int
    amount: float


class Contents(NamedTuple):
    """What a program runs in a step; a loop counts as often as it runs.

    Attributes:
      matmuls: FLOPs by the dtype that is multiplied, such as `"float32"`; where the
        operands are stored in a smaller one, `"float16 (stored in float8_e4m3fn)"`.
      converts: elements by `"float32 -> bfloat16"`.
      collectives: what the devices send each other, the most bytes first.
    """

    matmuls: Mapping[str, Total]
    converts: Mapping[str, Total]
    collectives: tuple[Collective, ...]


def read_contents(
    program: HloProgram, sent: Iterable[Transfer], line: Line, units: Units
) -> Contents:
    """Counts what a program runs.

    Args:
      program: what is compiled.
      sent: its transfers between devices.
      line: returns the user's line that an instruction comes from, given the
        instruction and the computation in which it stands.
      units: of the device that it is compiled for.
    """
    matmuls: dict[str, Total] = {}
    converts: dict[str, Total] = {}
    for step in walk(program):
        instruction, times = step.instruction, step.times
        caller = step.caller and step.caller.instruction
        if matmul := read_matmul(instruction, step.computation, units, caller):
            _add(matmuls, str(matmul), times, matmul.flops)
        elif instruction.opcode == "convert":
            operands = step.computation.operands(instruction)
            if operands and operands[0].arrays:
                old, new = operands[0].arrays[0], instruction.arrays[0]
                elements = new.size * 8 // new.bits if new.bits else 0
                name = f"{old.dtype_name} -> {new.dtype_name}"
                _add(converts, name, times, elements)
    return Contents(
        matmuls=_sorted(matmuls),
        converts=_sorted(converts),
        collectives=total(sent, line),
    )


def _add(totals: dict[str, Total], name: str, times: int, amount: float) -> None:
    before = totals.get(name, Total(0, 0))
    totals[name] = Total(before.times + times, before.amount + times * amount)


def _sorted(totals: Mapping[str, Total]) -> dict[str, Total]:
    return dict(sorted(totals.items(), key=lambda item: -item[1].amount))
