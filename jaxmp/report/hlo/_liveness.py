"""Which buffers of a compiled program are alive when it needs the most memory.

The compilers say how much memory a program needs, not what lies in it. They also say in
which order it runs: a buffer lives from the instruction that writes it to the last one
that reads it. Donated arguments, loops and updates are known to write in place. Whether
an elementwise fusion overwrites an operand that is not read again is unknown: of three
assumptions, the one that comes closest to the compiler's figure counts.
"""

import collections
import enum
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxmp.report.hlo._program import Computation, HloArray, HloProgram, Instruction

_ALIASES = ("bitcast", "optimization-barrier", "while")
_UNSTORED = ("constant", "parameter", "after-all")
_UPDATES = ("dynamic-update-slice", "scatter")


class Buffer(NamedTuple):
    """An array in memory.

    Attributes:
      array: its dtype and shape.
      size: bytes.
      argument: number of the argument that it is; None for what the program makes.
      source: the line of the user's code that made it.
      scope: the name scopes of that line.
    """

    array: HloArray
    size: int
    argument: int | None
    source: str
    scope: str


class Peak(NamedTuple):
    """The moment at which a program needs the most memory.

    Attributes:
      size: bytes, arguments included.
      buffers: everything that is alive.
    """

    size: int
    buffers: tuple[Buffer, ...]


class Reuse(enum.Enum):
    """Which operand an elementwise fusion overwrites, if it is not read again."""

    NONE = "none"
    SAME_SHAPE = "of the same shape"
    SAME_SIZE = "of the same size"


Source = Callable[[Instruction, Computation], str]


def find_peak(program: HloProgram, source: Source, expected: int) -> Peak:
    """Finds the moment at which a program needs the most memory.

    Args:
      program: what is compiled.
      source: returns the user's line that an instruction comes from, given the
        instruction and the computation in which it stands.
      expected: bytes that the program needs in all, as its compiler says.
    """
    found = (_peak(_State(program, source, reuse)) for reuse in Reuse)
    return min(found, key=lambda peak: abs(peak.size - expected))


def _peak(state: "_State") -> Peak:
    entry = state.program.computations[state.program.entry]
    given: dict[str, list[int]] = {}
    for instruction in entry.instructions:
        if instruction.opcode == "parameter":
            number = int(instruction.arguments)
            given[instruction.name] = [
                state.make(instruction, entry, array, number)
                for array in instruction.arrays
            ]
    arguments = [key for keys in given.values() for key in keys]
    size, alive = _run(state, entry, given, _by_alias(state.program, entry, given))
    held = tuple(state.buffers[key] for key in {*arguments, *alive})
    return Peak(size + sum(state.buffers[key].size for key in arguments), held)


class _State:
    """All buffers of a program, by number."""

    def __init__(self, program: HloProgram, source: Source, reuse: Reuse):
        self.program = program
        self.source = source
        self.reuse = reuse
        self.buffers: dict[int, Buffer] = {}
        self.inner: dict[str, tuple[int, list[int]]] = {}

    def make(
        self,
        instruction: Instruction,
        computation: Computation,
        array: HloArray,
        argument: int | None = None,
    ) -> int:
        """Makes a buffer for a result of an instruction, and returns its number."""
        key = len(self.buffers)
        size = 0 if array.is_on_chip else array.size
        source = self.source(instruction, computation) if size else ""
        self.buffers[key] = Buffer(array, size, argument, source, instruction.scope)
        return key


def _run(
    state: _State,
    computation: Computation,
    given: dict[str, list[int]],
    placed: dict[str, list[int | None]],
) -> tuple[int, list[int]]:
    """Bytes and buffers at the peak, without those that were given."""
    values = _values(state, computation, given, placed)
    last = _last_reads(computation, values)
    outside = {key for keys in given.values() for key in keys}
    alive: set[int] = set()
    size, best, at_best = 0, 0, []
    for i, instruction in enumerate(computation.instructions):
        if instruction.opcode != "parameter":
            new = set(values[instruction.name]) - outside - alive
            alive |= new
            size += sum(state.buffers[key].size for key in new)
        inner_size, inner_alive = _inner_peak(state, instruction, values)
        if size + inner_size > best:
            best, at_best = size + inner_size, [*alive, *inner_alive]
        for key in [key for key in alive if last.get(key, i) <= i]:
            alive.remove(key)
            size -= state.buffers[key].size
    return best, at_best


def _values(
    state: _State,
    computation: Computation,
    given: dict[str, list[int]],
    placed: dict[str, list[int | None]],
) -> dict[str, list[int]]:
    """The buffers that each value of a computation lies in."""
    values = dict(given)
    readers = _last_readers(computation)
    for i, instruction in enumerate(computation.instructions):
        if instruction.name in values:
            continue
        operands = [values.get(name, []) for name in instruction.operands]
        kept = _kept(state, instruction, computation, operands)
        if kept is not None:
            values[instruction.name] = kept
            continue
        dying = [
            key
            for name, keys in zip(instruction.operands, operands, strict=True)
            if readers.get(name) == i and len(keys) == 1
            for key in keys
            if state.buffers[key].argument is None
        ]
        homes = placed.get(instruction.name, [None] * len(instruction.arrays))
        values[instruction.name] = [
            home
            if home is not None
            else _reused(state, instruction, computation, array, dying)
            for home, array in zip(homes, instruction.arrays, strict=False)
        ]
    return values


def _kept(
    state: _State,
    instruction: Instruction,
    computation: Computation,
    operands: list[list[int]],
) -> list[int] | None:
    """The buffers of what moves no data; None for what writes its own result."""
    opcode = instruction.opcode
    if opcode == "tuple":
        # The only nested tuples of compiled programs are those of loops, flattened.
        return [key for keys in operands for key in keys]
    if opcode == "get-tuple-element":
        index = int(instruction.attribute("index") or 0)
        return operands[0][index : index + 1] if operands else []
    if opcode.endswith("-start"):
        results = computation.results(instruction)
        return [state.make(instruction, computation, array) for array in results]
    if opcode.endswith("-done"):
        return operands[0][: len(instruction.arrays)]
    if opcode in _ALIASES:
        return operands[0]
    if opcode in _UNSTORED:
        return []
    return None


def _reused(
    state: _State,
    instruction: Instruction,
    computation: Computation,
    array: HloArray,
    dying: list[int],
) -> int:
    """A buffer for a result: a new one, or one that is not read again."""
    if _writes_in_place(state, instruction):
        size = 0 if array.is_on_chip else array.size
        for key in dying:
            old = state.buffers[key]
            is_like = old.array == array or (
                state.reuse is Reuse.SAME_SIZE and old.array.dtype == array.dtype
            )
            if old.size == size and is_like:
                dying.remove(key)
                return key
    return state.make(instruction, computation, array)


def _writes_in_place(state: _State, instruction: Instruction) -> bool:
    if instruction.opcode in _UPDATES:
        return True
    if instruction.opcode != "fusion":
        return False
    body = state.program.computations[instruction.called[0]]
    if body.result.opcode in _UPDATES:
        return True
    is_elementwise = re.search(r"kind=k(Loop|Input)", instruction.attributes)
    return state.reuse is not Reuse.NONE and bool(is_elementwise)


def _inner_peak(
    state: _State, instruction: Instruction, values: dict[str, list[int]]
) -> tuple[int, list[int]]:
    """What the body of a loop, branch or call needs besides its arguments."""
    if instruction.opcode not in ("while", "conditional", "call"):
        return 0, []
    best: tuple[int, list[int]] = (0, [])
    for name in instruction.called:
        if name not in state.inner:
            body = state.program.computations[name]
            given = {
                i.name: [state.make(i, body, array, -1) for array in i.arrays]
                for i in body.instructions
                if i.opcode == "parameter"
            }
            state.inner[name] = _run(state, body, given, _in_place(body, given))
        best = max(best, state.inner[name], key=lambda found: found[0])
    return best


def _by_alias(
    program: HloProgram, entry: Computation, given: dict[str, list[int]]
) -> dict[str, list[int | None]]:
    """Results that are written into donated arguments."""
    by_name = entry.by_name
    arguments = {int(by_name[name].arguments): keys for name, keys in given.items()}
    homes = {out: arguments[number][0] for out, number in program.aliases.items()}
    return _place(entry, homes)


def _in_place(
    body: Computation, given: dict[str, list[int]]
) -> dict[str, list[int | None]]:
    """The results of a loop's body are written where its carry lies."""
    carry = next(iter(given.values()), [])
    return _place(body, dict(enumerate(carry)))


def _place(
    computation: Computation, homes: dict[int, int]
) -> dict[str, list[int | None]]:
    by_name = computation.by_name
    root = by_name[computation.root]
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    placed: dict[str, list[int | None]] = {}
    for number, name in enumerate(outputs):
        index = 0
        while name in by_name and by_name[name].opcode in (
            "bitcast",
            "copy-done",
            "get-tuple-element",
        ):
            if by_name[name].opcode == "get-tuple-element":
                index = int(by_name[name].attribute("index") or 0)
            name = by_name[name].operands[0]
        if number in homes and name in by_name:
            slots = placed.setdefault(name, [None] * len(by_name[name].arrays))
            if index < len(slots):
                slots[index] = homes[number]
    return placed


def _last_readers(computation: Computation) -> dict[str, int]:
    return {
        name: i
        for i, instruction in enumerate(computation.instructions)
        for name in instruction.operands
    }


def _last_reads(
    computation: Computation, values: dict[str, list[int]]
) -> dict[int, int]:
    last: dict[int, int] = {}
    for i, instruction in enumerate(computation.instructions):
        for name in (instruction.name, *instruction.operands):
            for key in values.get(name, ()):
                last[key] = i
    end = len(computation.instructions)
    for key in values.get(computation.root, ()):
        last[key] = end
    return last


class LiveBuffers(NamedTuple):
    """Equal buffers that are alive at the peak.

    Attributes:
      bytes: of all of them.
      copies: how many there are.
      array: dtype and shape of one, such as `"bf16[8,1024,768]"`.
      name: the argument that it is, or the name scopes of the line that made them.
      source: that line of the user's code; empty for arguments.
    """

    bytes: int
    copies: int
    array: str
    name: str
    source: str


def largest(
    buffers: Iterable[Buffer], arguments: Sequence[str], count: int = 10
) -> tuple[LiveBuffers, ...]:
    """The buffers that take the most memory; equal ones from one line are one entry.

    Args:
      buffers: those of a `Peak`.
      arguments: names of the program's arguments.
      count: how many entries to return.
    """
    groups: dict[tuple[str, str, str], list[Buffer]] = collections.defaultdict(list)
    for buffer in buffers:
        number = -1 if buffer.argument is None else buffer.argument
        name = arguments[number] if number >= 0 else ""
        if buffer.size:
            groups[str(buffer.array), buffer.source, name].append(buffer)
    found = [
        LiveBuffers(
            bytes=sum(buffer.size for buffer in group),
            copies=len(group),
            array=array,
            name=name or max((buffer.scope for buffer in group), key=len),
            source=source,
        )
        for (array, source, name), group in groups.items()
    ]
    return tuple(sorted(found, key=lambda entry: -entry.bytes)[:count])
