"""A compiled program: what XLA will run, in the order in which it will run it."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_KNOWN_TRIPS = re.compile(r'known_trip_count\\?"?:\s*\{\\?"n\\?":\\?"?(\d+)')
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_KINDS = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}


class HloArray(NamedTuple):
    """An array in a program.

    Attributes:
      dtype: as XLA writes it, such as `"bf16"`.
      dims: its shape.
      layout: as XLA writes it, with its tiles and the memory that it lives in.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def dtype_name(self) -> str:
        """The dtype as JAX writes it: `"bfloat16"` for `"bf16"`."""
        match = re.match(r"(bf|f|s|u|c)(\d+)(\w*)", self.dtype)
        if match is None:
            return "bool" if self.dtype == "pred" else self.dtype
        kind, bits, format_ = match.groups()
        return f"{_KINDS[kind]}{bits}" + f"_{format_}" * bool(format_)

    @property
    def size(self) -> int:
        """Bytes in memory, with the padding of a tiled layout."""
        match = re.search(r":T\(([\d,]+)\)", self.layout)
        dims = list(self.dims)
        order = [int(i) for i in self.layout.split(":")[0].split(",") if i]
        if match and len(order) == len(dims):
            tile = [int(n) for n in match[1].split(",")]
            dims = [dims[i] for i in reversed(order)]
            for i, n in zip(range(len(dims))[::-1], tile[::-1], strict=False):
                dims[i] = -(-dims[i] // n) * n
        return math.prod(dims) * self.bits // 8

    @property
    def elements(self) -> int:
        """How many numbers it holds, without padding."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits of one element."""
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        width = re.search(r"\d+", self.dtype)
        return int(width[0]) if width else 0

    @property
    def is_on_chip(self) -> bool:
        """Whether it lives in a TPU's own memory, not in that of the device."""
        return (":T(" in self.layout and "S(" in self.layout) or ":S(" in self.layout


class Instruction(NamedTuple):
    """One operation of a program.

    Attributes:
      name: what its result is called.
      opcode: such as `"fusion"`.
      arrays: its results.
      arguments: what stands in its parentheses.
      attributes: the rest of its line.
    """

    name: str
    opcode: str
    arrays: tuple[HloArray, ...]
    arguments: str
    attributes: str

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of what it reads."""
        return tuple(re.findall(r"%([\w.-]+)", self.arguments))

    def attribute(self, name: str) -> str:
        """The value of an attribute; empty if it is not there."""
        match = re.search(
            rf"\b{name}=(\{{[^}}]*\}}|\"[^\"]*\"|[^,\s]+)", self.attributes
        )
        return match[1].strip('"{}') if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs, except those of a reduction."""
        if self.opcode not in ("fusion", "while", "conditional", "call", "async-start"):
            return ()
        found = re.findall(
            r"\b(?:calls|body|true_computation|false_computation|to_apply)=%?([\w.-]+)",
            self.attributes,
        )
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if branches:
            found += [name.strip(" %") for name in branches[1].split(",")]
        return tuple(found)

    @property
    def scope(self) -> str:
        """The name scopes that it was traced in."""
        return self.attribute("op_name")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run.

    Attributes:
      name: such as `"main.2"`.
      instructions: what runs.
      root: the name of the instruction whose result is that of the computation.
    """

    name: str
    instructions: tuple[Instruction, ...]
    root: str

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Its instructions by name."""
        return {i.name: i for i in self.instructions}

    @property
    def result(self) -> Instruction:
        """The instruction that is its result."""
        return self.by_name[self.root]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results an instruction of its own reads."""
        return [self.by_name[x] for x in instruction.operands if x in self.by_name]

    def results(self, instruction: Instruction) -> tuple[HloArray, ...]:
        """What an instruction writes.

        The start of an asynchronous operation returns its operands as well.
        """
        if instruction.opcode == "copy-start":
            return instruction.arrays[:1]
        if instruction.opcode.endswith("-start"):
            given = [a for x in self.operands(instruction) for a in x.arrays]
            if instruction.arrays[: len(given)] == tuple(given):
                return instruction.arrays[len(given) :] or instruction.arrays
        return instruction.arrays


class HloProgram(NamedTuple):
    """A compiled program.

    Attributes:
      computations: by name.
      entry: name of the one that is run.
      aliases: which argument each result reuses, by the number of the result.
      sources: lines of code, `file:line (function)`, by the number of a stack frame;
        the innermost is the last.
      replicas: how many copies of the program run, as under `jax.pmap`.
      partitions: over how many devices each copy is divided.
    """

    computations: Mapping[str, Computation]
    entry: str
    aliases: Mapping[int, int]
    sources: Mapping[int, tuple[str, ...]]
    replicas: int = 1
    partitions: int = 1

    def source(
        self, instruction: Instruction, computation: Computation | None = None
    ) -> tuple[str, ...]:
        """Lines of code that an instruction comes from, the innermost last.

        Args:
          instruction: one that the compiler made itself, such as a copy, has the lines
            of its operands.
          computation: where it stands, to look for those.

        Returns:
          Lines; empty where nothing is known.
        """
        frame = int(instruction.attribute("stack_frame_id") or 0)
        if frame in self.sources:
            return self.sources[frame]
        if file := instruction.attribute("source_file"):
            return (f"{file}:{instruction.attribute('source_line')}",)
        for name in instruction.called:
            for inner in reversed(self.computations[name].instructions):
                if inner.opcode != "parameter" and (found := self.source(inner)):
                    return found
        for operand in computation.operands(instruction) if computation else ():
            if operand.opcode != "parameter":
                return self.source(operand, computation)
        return ()

    def trips(self, loop: Instruction, computation: Computation) -> int:
        """How often a `while` runs.

        Args:
          loop: its instruction.
          computation: where it stands.

        Returns:
          What the compiler found out. Failing that, what the condition says, if it
          compares a counter with a constant, as a scan's does. Failing both, 1.
        """
        known = _KNOWN_TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition").lstrip("%"))
        if condition is None or "direction=LT" not in condition.result.attributes:
            return 1
        counter, *limits = condition.operands(condition.result)
        if counter.opcode != "get-tuple-element" or not limits:
            return 1
        limit, start = _constant(limits[0]), 0
        index = int(counter.attribute("index") or 0)
        for carry in computation.operands(loop):
            if carry.opcode == "tuple":
                first = computation.operands(carry)[index : index + 1]
                start = (_constant(first[0]) if first else 0) or 0
        if limit is None:
            return 1
        return max(-(-(limit - start) // self._increment(loop, index)), 0)

    def _increment(self, loop: Instruction, index: int) -> int:
        """What an iteration adds to a counter: 2 in a loop that is unrolled once."""
        body = self.computations.get(loop.attribute("body").lstrip("%"))
        if body is None or body.result.opcode != "tuple":
            return 1
        increment, value = 0, body.by_name.get(body.result.operands[index])
        while value is not None and value.opcode == "add":
            terms = body.operands(value)
            increment += sum(_constant(term) or 0 for term in terms)
            value = next((term for term in terms if _constant(term) is None), None)
        return max(increment, 1)


def _constant(instruction: Instruction) -> int | None:
    is_number = instruction.opcode == "constant" and instruction.arguments.isdigit()
    return int(instruction.arguments) if is_number else None
