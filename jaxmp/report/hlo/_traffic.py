"""How many bytes an operation moves to and from a device's memory.

A fusion counts every operand once, or the part that it takes. XLA fuses a reduction
with its neighbours only where all of them read an element at the same place, so one
read serves them all. A value that is updated in place counts as what is new.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxmp.report.hlo._program import Computation, HloArray, HloProgram, Instruction

_SLICES = ("dynamic-slice", "gather", "slice")
# On TPUs: brings a part of an array into the chip's own memory ahead of time.
_PREFETCHES = ("dynamic-slice-start", "slice-start")
# What needs an element of its operand for the element of its result alone.
_ONE_TO_ONE = (
    "add",
    "bitcast",
    "convert",
    "copy",
    "divide",
    "multiply",
    "reshape",
    "subtract",
    "transpose",
)
_ALL = float("inf")


class Moved(NamedTuple):
    """Bytes of an array that are read or written.

    Attributes:
      array: the whole of it.
      bytes: how many are moved.
    """

    array: HloArray
    bytes: float


def moved(
    program: HloProgram, computation: Computation, instruction: Instruction
) -> list[Moved]:
    """What an operation reads and writes in memory.

    Args:
      program: what is compiled.
      computation: where the operation stands.
      instruction: the operation.
    """
    if instruction.opcode in _SLICES:
        found = [Moved(array, 2.0 * array.size) for array in instruction.arrays]
    else:
        found = [
            *_reads(program, computation, instruction),
            *_writes(program, computation, instruction),
        ]
    return [one for one in found if not one.array.is_on_chip]


def _reads(
    program: HloProgram, computation: Computation, instruction: Instruction
) -> Iterator[Moved]:
    operands = computation.operands(instruction)
    parts: dict[int, float] = {}
    if instruction.opcode == "fusion" and instruction.called:
        body = program.computations[instruction.called[0]]
        found = _Parts(body)
        for inner in body.instructions:
            if inner.opcode == "parameter":
                parts[int(inner.arguments)] = found.of(inner)
    elif instruction.opcode in _PREFETCHES:
        parts[0] = computation.results(instruction)[0].elements
    else:
        for i in range(len(operands)):
            touched = _touched(computation, instruction, i)
            parts[i] = _ALL if touched is None else touched
    for i, operand in enumerate(operands):
        for array in operand.arrays:
            part = min(parts.get(i, _ALL), array.elements)
            yield Moved(array, array.size * part / max(array.elements, 1))


class _Parts:
    """How many elements of each value of a fusion are read."""

    def __init__(self, body: Computation) -> None:
        self._body = body
        self._roots = {root.name for root in _roots(body)}
        self._found: dict[str, float] = {}
        self._readers: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in body.instructions:
            for name in set(instruction.operands):
                self._readers[name].append(instruction)

    def of(self, value: Instruction) -> float:
        """Elements of a value that are read; those of several readers add up."""
        if value.name not in self._found:
            readers = self._readers[value.name]
            read = sum(self._by_reader(value, reader) for reader in readers)
            is_result = value.name in self._roots or not readers
            self._found[value.name] = _ALL if is_result else read
        return self._found[value.name]

    def _by_reader(self, value: Instruction, reader: Instruction) -> float:
        places = [i for i, name in enumerate(reader.operands) if name == value.name]
        if reader.opcode in _SLICES and places == [0]:
            return sum(array.elements for array in reader.arrays)
        if reader.name in self._roots:
            touched = [_touched(self._body, reader, place) for place in places]
            return sum(_ALL if part is None else part for part in touched)
        if reader.opcode in _ONE_TO_ONE:
            sizes = [sum(a.elements for a in x.arrays) for x in (value, reader)]
            if sizes[0] == sizes[1]:
                return self.of(reader)
        return _ALL


def _roots(body: Computation) -> list[Instruction]:
    """What computes the results of a fusion."""
    result = body.result
    roots = body.operands(result) if result.opcode == "tuple" else [result]
    return [_before_bitcasts(body, root) for root in roots]


def _before_bitcasts(body: Computation, value: Instruction) -> Instruction:
    while value.opcode == "bitcast" and (operands := body.operands(value)):
        value = operands[0]
    return value


def _update(writer: Instruction, place: int) -> str | None:
    """The name of what an operation writes into its operand of this number."""
    if writer.opcode == "dynamic-update-slice" and place == 0:
        return writer.operands[1]
    # A scatter is given operands, indices, and an update for each operand.
    operands = (len(writer.operands) - 1) // 2
    if writer.opcode == "scatter" and place < operands:
        return writer.operands[operands + 1 + place]
    return None


def _touched(body: Computation, writer: Instruction, place: int) -> float | None:
    """Elements that an operation reads of an operand that it updates in place."""
    new = _update(writer, place)
    if new is None:
        return None
    # A scatter adds to what it finds; an update overwrites it.
    is_read = writer.opcode == "scatter"
    return float(body.by_name[new].arrays[0].elements) if is_read else 0.0


def _writes(
    program: HloProgram, computation: Computation, instruction: Instruction
) -> Iterator[Moved]:
    results = computation.results(instruction)
    if instruction.opcode == "custom-call" and _is_workspace(results):
        results = results[:-1]
    body, roots = computation, [instruction]
    if instruction.opcode == "fusion" and instruction.called:
        body = program.computations[instruction.called[0]]
        roots = _roots(body)
    for i, array in enumerate(results):
        root, place = (roots[i], 0) if len(roots) == len(results) else (roots[0], i)
        new = _update(root, place)
        size = array.size
        if new is not None and array.elements:
            size *= body.by_name[new].arrays[0].elements / array.elements
        yield Moved(array, float(size))


def _is_workspace(results: Sequence[HloArray]) -> bool:
    """Whether a library's call returns the memory that it works in last."""
    last = results[-1]
    return len(results) > 1 and last.dtype in ("s8", "u8") and len(last.dims) == 1
