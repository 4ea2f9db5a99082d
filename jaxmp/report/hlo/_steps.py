"""What a program runs, and how often: loops, fusions and calls gone through."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxmp.report.hlo._program import Computation, HloProgram, Instruction


class Step(NamedTuple):
    """An instruction where it runs.

    Attributes:
      instruction: what runs.
      computation: where it stands.
      times: how often.
      is_fused: whether it is part of a fusion, whose inner values are never stored.
      caller: the instruction that runs the computation; None at the entry.
    """

    instruction: Instruction
    computation: Computation
    times: int
    is_fused: bool
    caller: "Step | None" = None

    @property
    def operands(self) -> list["Step"]:
        """What computes its operands, where a fusion is given them outside of it."""
        found = []
        for operand in self.computation.operands(self.instruction):
            step = self._replace(instruction=operand)
            outside = self.caller
            if operand.opcode == "parameter" and self.is_fused and outside is not None:
                step = outside.operands[int(operand.arguments)]
            found.append(step)
        return found


def before(step: Step, depth: int = 4) -> Iterator[Step]:
    """Iterates over a step, what computes its operands, and what computes theirs."""
    steps = [step]
    for _ in range(depth):
        yield from steps
        steps = [operand for one in steps for operand in one.operands]


def after(step: Step, depth: int = 3) -> Iterator[Step]:
    """Iterates over what reads a step in its computation, and over what reads that."""
    names = {step.instruction.name}
    for _ in range(depth):
        readers = [
            reader
            for reader in step.computation.instructions
            if names.intersection(reader.operands)
        ]
        yield from (step._replace(instruction=reader) for reader in readers)
        names = {reader.name for reader in readers}


def walk(program: HloProgram) -> Iterator[Step]:
    """Iterates over everything that a program runs, loops and fusions included."""
    yield from _walk(program, program.entry, 1, None)


def _walk(
    program: HloProgram, name: str, times: int, caller: Step | None
) -> Iterator[Step]:
    computation = program.computations[name]
    is_fused = caller is not None and (
        caller.is_fused or caller.instruction.opcode == "fusion"
    )
    for instruction in computation.instructions:
        step = Step(instruction, computation, times, is_fused, caller)
        yield step
        trips = 1
        if instruction.opcode == "while":
            trips = program.trips(instruction, computation)
        for called in instruction.called:
            yield from _walk(program, called, times * trips, step)
