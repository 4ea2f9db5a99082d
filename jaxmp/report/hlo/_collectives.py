"""What devices send each other in a step: every collective once, in bytes on the wire.

An operation that moves several arrays counts once for each. What a compiler cuts into
a start, steps and an end is one operation, and so is an asynchronous operation of a
TPU, which appears again in every fusion that it runs behind.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxmp.report.hlo._flow import Flow
from jaxmp.report.hlo._groups import group_size
from jaxmp.report.hlo._program import (
    Computation,
    HloArray,
    HloProgram,
    Instruction,
)
from jaxmp.report.hlo._steps import Step, after, before, walk

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_TO_ONE = ("collective-broadcast", "collective-permute")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_ASYNCHRONOUS = "async_collective_fusion_config"
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_MOVES = ("bitcast", "copy", "get-tuple-element", "reshape", "transpose")

Line = Callable[[Instruction, Computation], str]


class Collective(NamedTuple):
    """Collectives of one kind, dtype and group.

    Attributes:
      kind: such as `"all-gather"`.
      dtype: of what is sent, as JAX writes it.
      group: how many devices send to each other.
      times: how many arrays they send in a step.
      bytes: of these arrays, whole: what an all-gather makes, what a reduction reads.
        For an all-to-all and a permute the array on one device.
      wire: bytes that each device sends in a step.
      source: the user's line that most of these bytes come from.
    """

    kind: str
    dtype: str
    group: int
    times: int
    bytes: int
    wire: float
    source: str


class Transfer(NamedTuple):
    """One array that a collective sends.

    Attributes:
      kind: the collective.
      array: the array, as the collective returns it.
      group: how many devices take part.
      bytes: of the whole array.
      step: the collective itself, where it runs.
      place: which of its arrays this is; None if there is one.
    """

    kind: str
    array: HloArray
    group: int
    bytes: int
    step: Step
    place: int | None

    @property
    def wire(self) -> float:
        """Bytes that each device sends, for all the times that it runs."""
        return self.step.times * wire_bytes(self.kind, self.bytes, self.group)

    @property
    def operand(self) -> Step | None:
        """What computes the array on each device before it is sent."""
        operands, place = self.step.operands, self.place or 0
        return operands[place] if place < len(operands) else None

    def line(self, line: Line) -> str:
        """The user's line: of its own array, where a collective sends several.

        Where the compiler made up the collective and what it sends, the line that reads
        what it brings.
        """
        steps = [before(self.step), after(self.step)]
        if self.place is not None and self.operand is not None:
            steps.insert(0, before(self.operand))
        found = itertools.chain.from_iterable(steps)
        lines = (line(step.instruction, step.computation) for step in found)
        return next(filter(None, lines), "")


def wire_bytes(kind: str, whole: int, group: int) -> float:
    """Bytes that each of a group of devices sends, by ring algorithms.

    They are the factors by which NCCL's tests turn a size over a time into the
    bandwidth of a link (nccl-tests, doc/PERFORMANCE.md), and the lower bounds of
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 2009.

    Args:
      kind: the collective.
      whole: bytes of the whole array, as in `Collective`.
      group: how many devices take part.

    Example:
      >>> wire_bytes("all-reduce", 800, 8), wire_bytes("all-gather", 800, 8)
      (1400.0, 700.0)
    """
    if group < 2:
        return 0.0
    if kind in _TO_ONE:
        return float(whole)
    part = whole * (group - 1) / group
    return 2 * part if kind == "all-reduce" else part


def transfers(program: HloProgram) -> tuple[Transfer, ...]:
    """Everything that a program sends in a step.

    Args:
      program: what is compiled, for any number of devices.
    """
    found, unstarted = [], {}
    for step in walk(program):
        kind = step.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if _ASYNCHRONOUS in step.instruction.attributes:
            key = kind, _channel(step.instruction)
            if not _calls(step.computation, _START):
                unstarted.setdefault(key, step)
                continue
            unstarted[key] = None
        found += _arrays(step, kind, program)
    # A step whose start has another form than those that are known.
    for (kind, _), step in unstarted.items():
        if step is not None:
            found += _arrays(step._replace(times=1), kind, program)
    return tuple(found)


def total(sent: Iterable[Transfer], line: Line) -> tuple[Collective, ...]:
    """Adds up transfers by kind, dtype and group, the most bytes first.

    Args:
      sent: the transfers of a program.
      line: returns the user's line that an instruction comes from.
    """
    groups: dict[tuple[str, str, int], list[Transfer]] = {}
    for one in sent:
        groups.setdefault((one.kind, one.array.dtype_name, one.group), []).append(one)
    found = [
        Collective(
            kind,
            dtype,
            group,
            times=sum(one.step.times for one in members),
            bytes=sum(one.step.times * one.bytes for one in members),
            wire=sum(one.wire for one in members),
            source=max(members, key=lambda one: one.wire).line(line),
        )
        for (kind, dtype, group), members in groups.items()
    ]
    return tuple(sorted(found, key=lambda c: (-c.wire, -c.bytes)))


def _arrays(step: Step, kind: str, program: HloProgram) -> Iterator[Transfer]:
    """The arrays that a collective sends."""
    instruction = step.instruction
    group = group_size(instruction, kind, program)
    parts = group if kind == "reduce-scatter" else 1
    is_sum = kind == "all-reduce" and step.is_fused
    if is_sum and _is_sliced(instruction, step.computation):
        kind = "reduce-scatter"
    arrays = _results(instruction, kind)
    sizes = [array.elements * array.bits // 8 * parts for array in arrays]
    if kind == "all-to-all" and len(arrays) > 1:
        # What every device sends to each of the others, cut into an array for each.
        arrays, sizes = arrays[:1], [sum(sizes)]
    for i, (array, size) in enumerate(zip(arrays, sizes, strict=True)):
        yield Transfer(
            kind=kind,
            array=array,
            group=group,
            bytes=size,
            step=step,
            place=i if len(arrays) > 1 else None,
        )


def _results(instruction: Instruction, kind: str) -> Sequence[HloArray]:
    """What a collective returns; a start names its operands first."""
    arrays = instruction.arrays
    if not instruction.opcode.endswith("-start") or kind == "all-reduce":
        return arrays
    given = len(instruction.operands)
    count = 1 if kind == "ragged-all-to-all" else given
    return arrays[given : given + count] or arrays


def _is_sliced(instruction: Instruction, computation: Computation) -> bool:
    """Whether each device keeps a slice of a sum: a reduce-scatter, as TPUs have it."""
    reads = [i for i in computation.instructions if instruction.name in i.operands]
    return bool(reads) and all(
        i.opcode == "dynamic-slice"
        or (i.opcode in _MOVES and _is_sliced(i, computation))
        for i in reads
    )


def _channel(instruction: Instruction) -> str:
    found = _CHANNEL.search(instruction.attributes)
    return found[1] if found else instruction.name


def _calls(computation: Computation, target: str) -> bool:
    return any(target in i.attributes for i in computation.instructions)


def finished(transfer: Transfer, flow: Flow) -> Step:
    """The step whose result is what a transfer brought.

    That is the collective itself, except for an asynchronous one of a TPU: the fusion
    that ends it returns what it brought.
    """
    step = transfer.step
    if _ASYNCHRONOUS not in step.instruction.attributes:
        return step
    channel = _channel(step.instruction)
    for computation in flow.program.computations.values():
        inner = computation.instructions
        if _calls(computation, _DONE) and any(_channel(i) == channel for i in inner):
            for instruction, outside in flow.callers(computation):
                return Step(instruction, outside, step.times, False)
    return step
