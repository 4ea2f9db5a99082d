"""Where a value of a compiled program goes: through fusions, loops and branches."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxmp.report.hlo._program import Computation, HloProgram, Instruction

MOVES = (
    "bitcast",
    "broadcast",
    "concatenate",
    "copy",
    "dynamic-slice",
    "gather",
    "pad",
    "reshape",
    "reverse",
    "select",
    "slice",
    "transpose",
)
"""What moves numbers and leaves them as they are."""

_FIRST_ONLY = ("dynamic-slice", "gather", "pad")

Passes = Callable[[str, int], bool]


class Value(NamedTuple):
    """A value, or one of a tuple.

    Attributes:
      computation: where it is computed.
      name: of the instruction that computes it.
      place: its number in the tuple that the instruction returns; None for no tuple.
    """

    computation: Computation
    name: str
    place: int | None


class End(NamedTuple):
    """Where a value is used up.

    Attributes:
      instruction: what reads it; None if the program returns it.
      computation: where that stands.
    """

    instruction: Instruction | None
    computation: Computation


def moves(opcode: str, position: int) -> bool:
    """Whether an operation only moves what it reads at a position."""
    if opcode == "select":
        return position > 0
    return opcode in MOVES and (position == 0 or opcode not in _FIRST_ONLY)


class Flow:
    """Follows values through a program, from what computes them to what reads them."""

    def __init__(self, program: HloProgram):
        self.program = program
        self._readers: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        self._callers: dict[str, list[tuple[Instruction, Computation]]] = {}
        for computation in program.computations.values():
            readers = self._readers[computation.name] = {}
            for instruction in computation.instructions:
                for position, name in enumerate(instruction.operands):
                    readers.setdefault(name, []).append((instruction, position))
                for called in instruction.called:
                    place = instruction, computation
                    self._callers.setdefault(called, []).append(place)

    def callers(
        self, computation: Computation
    ) -> list[tuple[Instruction, Computation]]:
        """The instructions that run a computation, and where they stand."""
        return self._callers.get(computation.name, [])

    def ends(self, start: Value, passes: Passes) -> Iterator[End]:
        """Iterates over what uses a value up.

        Args:
          start: the value.
          passes: whether it goes through an operation, given the opcode and at which
            position the operation reads it. Tuples, fusions, loops, branches and calls
            are gone through in any case, and so are ends of asynchronous operations.
        """
        waiting, seen = [start], set()
        while waiting:
            value = waiting.pop()
            key = value.computation.name, value.name, value.place
            if key in seen:
                continue
            seen.add(key)
            for found in self._follow(value, passes):
                if isinstance(found, Value):
                    waiting.append(found)
                else:
                    yield found

    def _follow(self, value: Value, passes: Passes) -> Iterator[Value | End]:
        if value.name == value.computation.root:
            yield from self._returned(value)
        readers = self._readers[value.computation.name]
        for reader, position in readers.get(value.name, ()):
            yield from self._read(value, reader, position, passes)

    def _returned(self, value: Value) -> Iterator[Value | End]:
        callers = self.callers(value.computation)
        if not callers:
            yield End(None, value.computation)
        for caller, outside in callers:
            yield Value(outside, caller.name, value.place)
            if caller.opcode == "while":
                yield from self._given(value, caller, 0)

    def _given(
        self, value: Value, caller: Instruction, position: int
    ) -> Iterator[Value]:
        """The parameter as which a fusion, loop, branch or call has an operand."""
        called = [self.program.computations[name] for name in caller.called]
        number = position
        if caller.opcode == "conditional":
            called, number = called[position - 1 : position], 0
        for body in called:
            for inner in body.instructions:
                if inner.opcode == "parameter" and inner.arguments == str(number):
                    yield Value(body, inner.name, value.place)

    def _read(
        self, value: Value, reader: Instruction, position: int, passes: Passes
    ) -> Iterator[Value | End]:
        opcode = reader.opcode.removesuffix("-start")
        as_result = Value(value.computation, reader.name, None)
        if opcode == "get-tuple-element":
            if value.place in (None, int(reader.attribute("index") or 0)):
                yield as_result
        elif opcode == "tuple":
            yield as_result._replace(place=position)
        elif opcode == "optimization-barrier" or opcode.endswith("-done"):
            yield as_result._replace(place=value.place)
        elif reader.called:
            yield from self._given(value, reader, position)
        elif passes(opcode, position) or "ConcatBitcast" in reader.attributes:
            several = len(reader.arrays) > 1 and not reader.opcode.endswith("-start")
            yield as_result._replace(place=position if several else None)
        else:
            yield End(reader, value.computation)
