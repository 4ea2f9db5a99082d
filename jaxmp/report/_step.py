"""`compile_step`: a training step as the compilers of real machines see it."""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmp._jaxpr.sources import is_users
from jaxmp.report._views import bar_chart, report_page, report_text
from jaxmp.report.compile._compiler import compile_programs, is_out_of_memory
from jaxmp.report.compile._programs import (
    Program,
    donated_arguments,
    export_program,
    under_policy,
)
from jaxmp.report.compile._worker import Answer
from jaxmp.report.compile.chips import Chip, chip_of, chips
from jaxmp.report.compile.progress import Progress
from jaxmp.report.compile.targets import Target, read_target, target_devices
from jaxmp.report.hlo._contents import Contents, read_contents
from jaxmp.report.hlo._hlo import Computation, HloProgram, Instruction, read_hlo
from jaxmp.report.hlo._liveness import LiveBuffers, largest, peak
from jaxmp.report.hlo._roofline import Roofline, roofline

_WRAPPERS = re.compile(r"^jit\(call\)/call_exported/")


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
      output: results, those that are written into donated arguments included.
      peak: arguments, temp and those results that reuse no argument; None for a step
        that its compiler refused, for it does not fit.
      flops: FLOPs of a step, as the compiler counts them; None for GPUs, whose compiler
        does not.
      accessed: bytes that a step reads and writes, counted likewise.
      contents: matmuls, converts and collectives by dtype; None, as what follows, for a
        program that its compiler cannot write down.
      roofline: estimate of the time; None for a device whose peaks are unknown.
      buffers: the ten largest entries of what is alive at the peak.
      explained: bytes of all buffers that are alive at the peak, the ten and the rest,
        over `peak`: how well what is worked out meets what the compiler tells.
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
    seconds_to_compile: float = 0.0
    message: str = ""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What the compilers said of a step: one row for each policy and target.

    Attributes:
      rows: target by target, the policies in the order in which they were given.
    """

    rows: tuple[Row, ...]

    def row(self, policy: str, target: str) -> Row:
        """The row of a policy and a target, as they were written.

        Raises:
          KeyError: if the report has none.
        """
        for row in self.rows:
            if (row.policy, row.target) == (policy, target):
                return row
        told = ", ".join(f"{row.policy} on {row.target}" for row in self.rows)
        raise KeyError(f"The report has no row of {policy} on {target}, but {told}.")

    def to_rows(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain numbers and strings."""
        return [_plain(row) for row in self.rows]

    def to_json(self) -> str:
        """The rows as JSON."""
        return json.dumps(self.to_rows(), indent=2)

    def to_png(self, path: Any) -> None:
        """Writes a bar chart of memory and of the estimated time.

        Args:
          path: file to write.

        Raises:
          MissingPackage: if matplotlib is not installed.
        """
        Path(path).write_bytes(bar_chart(self.rows))

    def to_html(self, path: Any) -> None:
        """Writes one self-contained page; with the chart, if matplotlib is installed.

        Args:
          path: file to write.
        """
        has_matplotlib = importlib.util.find_spec("matplotlib") is not None
        chart = bar_chart(self.rows) if has_matplotlib else None
        Path(path).write_text(report_page(self.rows, chart), encoding="utf-8")

    def __str__(self) -> str:
        return report_text(self.rows)


def compile_step(
    step: Callable[..., Any],
    *args: Any,
    policies: Sequence[Any] = ("float32", "mixed_bfloat16", "mixed_float16"),
    targets: Sequence[str] = ("h100", "tpu-v5e"),
    donate_argnums: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    cache: bool = True,
    progress: bool | None = None,
) -> StepReport:
    """Compiles a training step for machines that need not be there.

    XLA's own compilers for the H100 and for TPUs run in a process of their own; nothing
    is executed. What they said is kept on disk (`$JAXMP_CACHE_DIR`, or
    `~/.cache/jaxmp`), by the program, the target and the compiler's version.

    Args:
      step: a function of pytrees of arrays, jitted or not. If it has an argument named
        `policy`, it is given the policy; else it runs under `jaxmp.autocast`.
      *args: arrays or `jax.ShapeDtypeStruct`s. A `NamedSharding` of theirs, over
        devices or a `jax.sharding.AbstractMesh`, divides the step over the devices of a
        target such as `"tpu-v5e:16"`.
      policies: anything that `jaxmp.get_policy` takes; savings are given against the
        first.
      targets: names of `targets()`.
      donate_argnums: positions of the arguments that the step may overwrite, such as
        parameters and optimizer state; by default those that a jitted step donates.
      compiler_options: of XLA, by name, as for `jax.stages.Lowered.compile`; for all
        targets.
      cache: whether to use and keep answers on disk.
      progress: whether to say on the standard error what is done, and how long it will
        take; by default in a terminal.

    Returns:
      A `StepReport`. A step that does not fit into a target's memory is a row of it.

    Raises:
      UnknownTarget: for a target that is none.
      MissingTargetPackage: if a target's compiler is not installed.
      NotAnArray: for an argument that is no array.
      StepDoesNotTrace: for whatever the step raises.
      ShardingMismatch: if the step is divided over another number of devices.
      CompilerFailed: if a compiler fails for another reason than memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.report import compile_step
      >>> def step(w, x):
      ...     return w - jax.grad(lambda w: ((x @ w) ** 2).mean())(w)
      >>> shapes = [jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in range(2)]
      >>> told = compile_step(step, *shapes, policies=["float32"], targets=["cpu"])
      >>> told.rows[0].arguments
      32768
    """
    donate = donate_argnums
    if donate is None:
        donate = donated_arguments(step, args)
    return _report(
        [(policy, under_policy(step, policy), args, donate) for policy in policies],
        targets,
        compiler_options,
        cache,
        Progress(progress),
    )


def compile_step_of(
    step_of_policy: Callable[[Any], tuple[Any, ...]],
    *,
    policies: Sequence[Any] = ("float32", "mixed_bfloat16", "mixed_float16"),
    targets: Sequence[str] = ("h100", "tpu-v5e"),
    donate_argnums: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    cache: bool = True,
    progress: bool | None = None,
) -> StepReport:
    """As `compile_step`, for a step whose arguments depend on the policy, too.

    Args:
      step_of_policy: takes a policy and returns `(step, *args)`.
      policies: as for `compile_step`.
      targets: as for `compile_step`.
      donate_argnums: as for `compile_step`.
      compiler_options: as for `compile_step`.
      cache: as for `compile_step`.
      progress: as for `compile_step`.

    Returns:
      A `StepReport`.

    Raises:
      The same errors as `compile_step`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp
      >>> from jaxmp.report import compile_step_of
      >>> def step_of_policy(policy):
      ...     dtype = jaxmp.get_policy(policy).param_dtype
      ...     return jnp.tanh, jax.ShapeDtypeStruct((8, 8), dtype)
      >>> told = compile_step_of(
      ...     step_of_policy, policies=["float32", "bfloat16"], targets=["cpu"])
      >>> [row.arguments for row in told.rows]
      [256, 128]
    """
    jobs = []
    said = Progress(progress)
    for policy in policies:
        said.say(f"making the step under {policy}")
        step, *args = step_of_policy(policy)
        donate = donate_argnums
        if donate is None:
            donate = donated_arguments(step, args)
        jobs.append((policy, step, args, donate))
    return _report(jobs, targets, compiler_options, cache, said)


def _report(
    jobs: list[tuple[Any, Callable[..., Any], Sequence[Any], Sequence[int]]],
    targets: Sequence[str],
    options: Mapping[str, Any] | None,
    cache: bool,
    progress: Progress,
) -> StepReport:
    names, programs = [], []
    for target in [read_target(target) for target in targets]:
        for policy, step, args, donate in jobs:
            names.append(f"{policy} on {target}")
            progress.say(f"tracing {names[-1]}")
            programs.append(export_program(step, args, target, donate, options))
    answers = compile_programs(programs, names=names, cache=cache, progress=progress)
    rows = []
    for (policy, *_), name, program, answer in zip(
        jobs * len(targets), names, programs, answers, strict=True
    ):
        progress.say(f"reading {name}")
        rows.append(read_answer(str(policy), program, answer))
    return StepReport(tuple(rows))


def read_answer(policy: str, program: Program, answer: Answer) -> Row:
    """Makes a row of what a compiler said."""
    chip, memory = _device(program.target)
    if is_out_of_memory(answer):
        return Row(
            policy,
            str(program.target),
            fits=False,
            memory=memory,
            seconds_to_compile=answer.seconds,
            message=answer.error.partition("\n")[0],
        )
    sizes = answer.memory
    total = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    row = Row(
        policy,
        str(program.target),
        None if memory is None else total <= memory,
        memory,
        sizes["argument"],
        sizes["temp"],
        sizes["output"],
        total,
        answer.costs.get("flops"),
        answer.costs.get("bytes accessed"),
        seconds_to_compile=answer.seconds,
    )
    if not answer.text:
        return row
    hlo = read_hlo(answer.text)
    highest = peak(hlo, functools.partial(users_line, hlo), total)
    return row._replace(
        contents=read_contents(hlo),
        roofline=None if chip is None else roofline(hlo, chip),
        buffers=tuple(
            buffer._replace(name=_WRAPPERS.sub("", buffer.name))
            for buffer in largest(highest.buffers, program.arguments)
        ),
        explained=highest.size / total if total else None,
    )


def users_line(
    program: HloProgram, instruction: Instruction, computation: Computation
) -> str:
    """The innermost line of a user's code that an instruction comes from."""
    lines = program.source(instruction, computation)
    own = [line for line in lines if is_users(line.partition(":")[0])]
    return (own or lines or ("",))[-1]


def _device(target: Target) -> tuple[Chip | None, int | None]:
    if not target.is_local:
        chip = chips[target.name]
        return chip, chip.memory
    device = target_devices(str(target))[0]
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        limit = None
    return chip_of(device.device_kind), limit


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        plain = {name: _plain(x) for name, x in value._asdict().items()}
        if isinstance(value, Roofline):
            plain |= {"bound": value.bound, "largest_gain": value.largest_gain}
        return plain
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    return value
