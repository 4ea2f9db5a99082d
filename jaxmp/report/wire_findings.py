"""What devices send each other in the wrong dtype, with the user's line and the repair.

`gathered-in-float32` is an all-gather of float32 whose result is only cast to half.
`reduced-in-half` is a sum over devices in half that the step keeps: it reaches what the
step returns, such as new weights, without a matmul or another sum in between. The sum
of activations that tensor parallelism makes is read by the next matmul, in half again,
and a single number is too few bytes to matter: neither is a finding.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxmp._jaxpr.scopes import EXPORT_SCOPE
from jaxmp._jaxpr.sources import Source
from jaxmp._views.numbers import MIB
from jaxmp.report.audit.records import Finding
from jaxmp.report.hlo._collectives import Line, Transfer, finished
from jaxmp.report.hlo._flow import End, Flow, Value, moves
from jaxmp.report.hlo._program import HloProgram, Instruction
from jaxmp.report.hlo._steps import Step, before

GATHERED, REDUCED = "gathered-in-float32", "reduced-in-half"
WIRE_KINDS = (GATHERED, REDUCED)
"""The kinds of finding that `find_on_the_wire` makes."""

_HALF, _WIDE = ("bfloat16", "float16"), ("float32", "float64")
_REDUCTIONS = ("all-reduce", "reduce-scatter")
# What makes another value out of many: none of it is the sum any more.
_CONSUMERS = (
    "convolution",
    "custom-call",
    "dot",
    "ragged-dot",
    "reduce",
    "reduce-window",
    "scatter",
    "select-and-scatter",
    "sort",
)
_LINE = re.compile(r"(.*):(\d+)(?: \((.*)\))?")


class _Found(NamedTuple):
    """A transfer that is a finding, and the half dtype that it is about."""

    kind: str
    transfer: Transfer
    half: str


def find_on_the_wire(
    program: HloProgram, sent: Iterable[Transfer], line: Line
) -> tuple[Finding, ...]:
    """Finds transfers in the wrong dtype, the most bytes first; one for each line.

    Args:
      program: what is compiled.
      sent: its transfers.
      line: returns the user's line that an instruction comes from.
    """
    groups: dict[tuple[str, ...], list[_Found]] = {}
    for found in _find(program, sent):
        one = found.transfer
        key = (found.kind, one.kind, one.array.dtype_name, found.half, one.line(line))
        groups.setdefault(key, []).append(found)
    ordered = sorted(groups.items(), key=lambda item: -_wire(item[1]))
    return tuple(_finding(key[-1], members) for key, members in ordered)


def _find(program: HloProgram, sent: Iterable[Transfer]) -> Iterator[_Found]:
    flow = Flow(program)
    for one in sent:
        dtype = one.array.dtype_name
        if one.group < 2 or one.array.elements < 2:
            continue
        if one.kind == "all-gather" and dtype in _WIDE:
            casts = _casts(one, flow)
            if len(casts) == 1 and not _is_widened(one.operand, program):
                yield _Found(GATHERED, one, casts.pop())
        elif dtype in _HALF and _is_summed(one, flow) and _is_kept(one, flow):
            yield _Found(REDUCED, one, dtype)


def _casts(one: Transfer, flow: Flow) -> set[str]:
    """The half dtypes that a gathered array is cast to; empty if it has other uses."""
    found = set()
    for end in flow.ends(_result(one, flow), moves):
        reader = end.instruction
        if reader is None or reader.opcode != "convert":
            return set()
        found.add(reader.arrays[0].dtype_name)
    return found if found <= set(_HALF) else set()


def _is_widened(step: Step | None, program: HloProgram) -> bool:
    """Whether the compiler made float32 of half, as CPUs do, and not the user."""
    while step is not None:
        instruction = step.instruction
        if instruction.opcode == "fusion":
            body = program.computations[instruction.called[0]]
            step = Step(body.result, body, step.times, True, step)
            continue
        operand = next(iter(step.operands), None)
        if instruction.opcode == "convert" and operand is not None:
            return operand.instruction.arrays[0].dtype_name in _HALF
        step = operand if instruction.opcode in ("bitcast", "copy") else None
    return False


def _is_summed(one: Transfer, flow: Flow) -> bool:
    """Whether a transfer is part of a sum: TPUs pass partial sums on, and add."""
    if one.kind != "collective-permute":
        return one.kind in _REDUCTIONS and _adds(one.step.instruction, flow.program)
    ends = flow.ends(_result(one, flow), _casts_and_moves)
    return any(end.instruction and end.instruction.opcode == "add" for end in ends)


def _adds(instruction: Instruction, program: HloProgram) -> bool:
    """Whether a reduction adds; a maximum loses nothing in half."""
    combine = program.computations.get(instruction.attribute("to_apply").lstrip("%"))
    return combine is None or any(i.opcode == "add" for i in combine.instructions)


def _is_kept(one: Transfer, flow: Flow) -> bool:
    return any(map(_is_result, flow.ends(_result(one, flow), _is_elementwise)))


def _is_result(end: End) -> bool:
    return end.instruction is None


def _casts_and_moves(opcode: str, position: int) -> bool:
    return opcode == "convert" or moves(opcode, position)


def _is_elementwise(opcode: str, position: int) -> bool:
    return opcode not in _CONSUMERS


def _result(one: Transfer, flow: Flow) -> Value:
    """The array where the program has it, after it was sent."""
    step = finished(one, flow)
    return Value(step.computation, step.instruction.name, one.place)


def _finding(line: str, members: list[_Found]) -> Finding:
    kind, one, half = members[0]
    scope = _scope(one.step)
    group = max(found.transfer.group for found in members)
    what = (
        f"{one.kind} of {one.array.dtype_name} over {group} devices "
        f"({sum(found.transfer.step.times for found in members)} a step, "
        f"{_wire(members) / MIB:.2f} MiB on the wire per device)"
    )
    if kind == GATHERED:
        message = f"{what} whose result is only cast to {half}: twice the bytes"
        repair = (
            f"Gather x.astype(jnp.{half}), for the same bits: cast where it is used "
            "and leave the gather to the compiler, or all_gather what is cast. Before "
            "a constraint that replicates, constrain the cast to the sharding of x, "
            "or XLA may gather first."
        )
    else:
        message = f"{what}: every addition on the way rounds to {half}"
        repair = (
            "Add reduce=float32 to the policy, as in 'mixed_bfloat16,reduce=float32': "
            "gradients are then summed in float32, for twice the bytes."
            if not scope or "transpose(" in scope
            else "Cast before the sum, x.astype(jnp.float32), or let the matmul in "
            "front of it return float32: preferred_element_type=jnp.float32."
        )
    return Finding(kind, _source(line), scope, message, repair)


def _wire(members: list[_Found]) -> float:
    return sum(found.transfer.wire for found in members)


def _source(line: str) -> Source | None:
    match = _LINE.fullmatch(line)
    return Source(match[1], int(match[2]), match[3] or "?") if match else None


def _scope(step: Step) -> str:
    """The name scopes of a collective, or of what it sends."""
    scopes = (one.instruction.scope for one in before(step))
    return next(filter(None, scopes), "").removeprefix(EXPORT_SCOPE)
