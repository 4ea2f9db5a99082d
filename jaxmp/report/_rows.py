"""`Row`: one step on one target, made from what the target's compiler said."""

import functools
import os
from typing import NamedTuple

import jax

from jaxmp._jaxpr.scopes import EXPORT_SCOPE
from jaxmp._jaxpr.sources import is_users
from jaxmp.report.audit.records import Finding
from jaxmp.report.compile._programs import Program
from jaxmp.report.compile._worker import Answer
from jaxmp.report.compile.chips import Chip, Units, chip_of, chips, units_of
from jaxmp.report.compile.targets import Target, target_devices
from jaxmp.report.hlo._collectives import transfers
from jaxmp.report.hlo._contents import Contents, read_contents
from jaxmp.report.hlo._liveness import LiveBuffers, find_peak, largest
from jaxmp.report.hlo._parse import read_hlo
from jaxmp.report.hlo._program import Computation, HloProgram, Instruction
from jaxmp.report.hlo._roofline import Roofline, roofline
from jaxmp.report.wire_findings import find_on_the_wire

_HERE = os.path.dirname(__file__) + os.sep


class Row(NamedTuple):
    """A step under one policy, compiled for one target. Sizes are in bytes.

    Attributes:
      policy: the policy, as it was written.
      target: name of the target, with the number of devices if that is not one.
      fits: whether the step fits into the memory of a device; None if that is unknown.
      memory: bytes of memory that a device has; None if unknown.
      arguments: arguments of the step; those that it does not use are left out, as by
        `jax.jit`.
      temp: everything that it makes and drops.
      output: results, including those that are written into donated arguments.
      peak: arguments, temp and those results that reuse no argument; None for a step
        that its compiler refused because it does not fit.
      flops: FLOPs of a step, as the compiler counts them; None for GPUs, whose compiler
        does not count.
      accessed: bytes that a step reads and writes, counted likewise.
      contents: matmuls, converts and collectives by dtype. This and what follows is
        None for a program that its compiler cannot write down.
      roofline: estimate of what it costs, and on the H100 of its time; None for a
        device whose peaks are unknown.
      buffers: the ten largest entries of what is alive at the peak.
      explained: bytes of all buffers found alive at the peak, over `peak`: how well
        the reading agrees with the compiler's own figure.
      findings: what devices send each other in the wrong dtype, the most bytes first:
        `"gathered-in-float32"` and `"reduced-in-half"`.
      seconds_to_compile: by the target's compiler.
      message: what the compiler said, if it refused the step.
    """

    policy: str
    target: str
    fits: bool | None
    memory: int | None
    arguments: int | None = None
    temp: int | None = None
    output: int | None = None
    peak: int | None = None
    flops: float | None = None
    accessed: float | None = None
    contents: Contents | None = None
    roofline: Roofline | None = None
    buffers: tuple[LiveBuffers, ...] = ()
    explained: float | None = None
    findings: tuple[Finding, ...] = ()
    seconds_to_compile: float = 0.0
    message: str = ""


def read_answer(policy: str, program: Program, answer: Answer) -> Row:
    """Makes a row of a compiler's answer.

    Args:
      policy: the policy, as it was written.
      program: what was compiled.
      answer: what its compiler said.
    """
    chip, units, memory = _device(program.target)
    row = functools.partial(
        Row,
        policy=policy,
        target=str(program.target),
        memory=memory,
        seconds_to_compile=answer.seconds,
    )
    if answer.is_out_of_memory:
        return row(fits=False, message=answer.error.partition("\n")[0])
    sizes = answer.memory
    peak = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    row = functools.partial(
        row,
        fits=None if memory is None else peak <= memory,
        arguments=sizes["argument"],
        temp=sizes["temp"],
        output=sizes["output"],
        peak=peak,
        flops=answer.costs.get("flops"),
        accessed=answer.costs.get("bytes accessed"),
    )
    if not answer.text:
        return row()
    hlo = read_hlo(answer.text)
    line = functools.partial(users_line, hlo)
    found = find_peak(hlo, line, peak)
    buffers = largest(found.buffers, program.arguments)
    sent = transfers(hlo)
    return row(
        contents=read_contents(hlo, sent, line, units),
        roofline=None if chip is None else roofline(hlo, chip),
        buffers=tuple(
            b._replace(name=b.name.removeprefix(EXPORT_SCOPE)) for b in buffers
        ),
        explained=found.size / peak if peak else None,
        findings=find_on_the_wire(hlo, sent, line),
    )


def users_line(
    program: HloProgram, instruction: Instruction, computation: Computation
) -> str:
    """The innermost line of the user's code that an instruction comes from."""
    lines = program.source(instruction, computation)
    # What stands around the last line of this package traced or lowered the program.
    ours = [i for i, line in enumerate(lines) if line.startswith(_HERE)]
    lines = lines[ours[-1] + 1 :] if ours else lines
    own = [line for line in lines if is_users(line.partition(":")[0])]
    return (own or lines or ("",))[-1]


def _device(target: Target) -> tuple[Chip | None, Units, int | None]:
    """The peaks of a target's device, its units, and its bytes of memory."""
    if not target.is_local:
        chip = chips[target.name]
        return chip, chip.units, chip.memory
    device = target_devices(str(target))[0]
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        limit = None
    units = units_of(device) or Units(device.platform, frozenset())
    return chip_of(device.device_kind), units, limit
