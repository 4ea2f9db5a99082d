"""Reads the text of a compiled program, `jax.stages.Compiled.as_text()`."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence

from jaxmp.report.hlo._program import Computation, HloArray, HloProgram, Instruction

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_TABLE_ROW = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")
_ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+), \{[\d, ]*\}")
_PARENTHESIS = re.compile(r"[()]")


@functools.lru_cache(maxsize=8)
def read_hlo(text: str) -> HloProgram:
    """Reads a program.

    Args:
      text: what `compiled.as_text()` returned.
    """
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    computations: dict[str, Computation] = {}
    entry, name, instructions, root = "", "", [], ""
    for line in text.splitlines():
        if line.startswith("  "):
            instruction = _read_instruction(line.strip().removeprefix("ROOT "))
            if instruction is not None:
                instructions.append(instruction)
                root = instruction.name if line.lstrip().startswith("ROOT ") else root
        elif line == "}":
            computations[name] = Computation(name, tuple(instructions), root)
        elif line.endswith("{") and not line.startswith("HloModule"):
            is_entry = line.startswith("ENTRY ")
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            entry = name if is_entry else entry
            instructions = []
        elif line in _TABLES:
            table = tables.setdefault(line, {})
        elif match := _TABLE_ROW.match(line):
            table[int(match[1])] = match[2] if match[2] is not None else match[3]
    return HloProgram(
        computations=computations,
        entry=entry,
        aliases=_aliases(text),
        sources=_sources(tables),
        replicas=_count(text, "replica_count"),
        partitions=_count(text, "num_partitions"),
    )


def _read_instruction(line: str) -> Instruction | None:
    name, equals, rest = line.partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=name.lstrip("%"),
        opcode=rest[:opening],
        arrays=tuple(_read_arrays(shape)),
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _read_arrays(shape: str) -> Iterator[HloArray]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(n.strip("<=")) for n in dims.split(",") if n)
        yield HloArray(dtype, sizes, layout)


def _aliases(text: str) -> dict[int, int]:
    head = text.partition("\n")[0]
    start = head.find("input_output_alias={")
    if start < 0:
        return {}
    # Up to the next attribute of the module, which is the layout of the entry.
    listed = head[start:].partition("entry_computation_layout")[0]
    return {
        int(output.split(",")[0] or 0): int(argument)
        for output, argument in _ALIAS.findall(listed)
    }


def _count(text: str, attribute: str) -> int:
    """A count of devices in the head of a program, where 1 is not written."""
    match = re.search(rf"\b{attribute}=(\d+)", text.partition("\n")[0])
    return int(match[1]) if match else 1


def _sources(tables: Mapping[str, Mapping[int, str]]) -> dict[int, tuple[str, ...]]:
    """The lines of code of each stack frame, the innermost last."""
    files, functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})
    locations = {}
    for key, row in tables.get("FileLocations", {}).items():
        fields = _fields(row)
        file = files.get(fields.get("file_name_id", 0), "?")
        function = functions.get(fields.get("function_name_id", 0), "?")
        locations[key] = f"{file}:{fields.get('line', 0)} ({function})"
    frames = {key: _fields(row) for key, row in tables.get("StackFrames", {}).items()}
    return {key: tuple(_stack(frames, locations, key)) for key in frames}


def _stack(
    frames: Mapping[int, Mapping[str, int]], locations: Mapping[int, str], key: int
) -> Sequence[str]:
    found: list[str] = []
    while key in frames:
        frame = frames[key]
        found.append(locations.get(frame.get("file_location_id", 0), "?"))
        # The number of the parent is written one too high.
        parent = frame.get("parent_frame_id", 0) - 1
        if parent >= key:
            break
        key = parent
    return found[::-1]


def _fields(row: str) -> dict[str, int]:
    return {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", row)}
