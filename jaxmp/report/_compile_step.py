"""`compile_step`: a training step as the compilers of real machines see it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmp.report._rows import read_answer
from jaxmp.report._step_report import StepReport
from jaxmp.report.compile._compiler import compile_programs
from jaxmp.report.compile._programs import (
    donated_arguments,
    export_program,
    under_policy,
)
from jaxmp.report.compile.progress import Progress
from jaxmp.report.compile.targets import read_target


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
    is executed. Their answers are kept on disk (`$JAXMP_CACHE_DIR`, or
    `~/.cache/jaxmp`), by the program, the target and the compiler's version.

    Args:
      step: a function of pytrees of arrays, jitted or not. If it has an argument named
        `policy`, it is given the policy; otherwise it runs under `jaxmp.autocast`.
      *args: arrays or `jax.ShapeDtypeStruct`s. If they have a `NamedSharding`, over
        devices or a `jax.sharding.AbstractMesh`, it divides the step over the devices
        of a target such as `"tpu-v5e:16"`.
      policies: anything that `jaxmp.get_policy` takes; savings are relative to the
        first.
      targets: names of `targets()`.
      donate_argnums: positions of the arguments that the step may overwrite, such as
        parameters and optimizer state; by default those that a jitted step donates.
      compiler_options: of XLA, by name, as for `jax.stages.Lowered.compile`; for all
        targets.
      cache: whether to use and keep answers on disk.
      progress: whether to report on standard error what is being done, and how long it
        will take; by default only in a terminal.

    Returns:
      A `StepReport`. A step that does not fit into a target's memory is a row of it.

    Raises:
      UnknownTarget: for a target that does not exist.
      MissingTargetPackage: if a target's compiler is not installed.
      NotAnArray: for an argument that is not an array.
      StepDoesNotTrace: for whatever the step raises.
      ShardingMismatch: if the step is divided over another number of devices.
      CompilerFailed: if a compiler fails for another reason than memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.report import compile_step
      >>> def step(w, x):
      ...     return w - jax.grad(lambda w: ((x @ w) ** 2).mean())(w)
      >>> shapes = [jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in range(2)]
      >>> report = compile_step(step, *shapes, policies=["float32"], targets=["cpu"])
      >>> report.rows[0].arguments
      32768
    """
    if donate_argnums is None:
        donate_argnums = donated_arguments(step, args)
    return compile_step_of(
        lambda policy: (under_policy(step, policy), *args),
        policies=policies,
        targets=targets,
        donate_argnums=donate_argnums,
        compiler_options=compiler_options,
        cache=cache,
        progress=progress,
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
      >>> report = compile_step_of(
      ...     step_of_policy, policies=["float32", "bfloat16"], targets=["cpu"])
      >>> [row.arguments for row in report.rows]
      [256, 128]
    """
    log, steps = Progress(progress), []
    for policy in policies:
        log.say(f"making the step under {policy}")
        step, *args = step_of_policy(policy)
        donated = donate_argnums
        if donated is None:
            donated = donated_arguments(step, args)
        steps.append((policy, step, args, donated))
    names, programs = [], []
    for target in [read_target(target) for target in targets]:
        for policy, step, args, donated in steps:
            names.append(f"{policy} on {target}")
            log.say(f"tracing {names[-1]}")
            program = export_program(step, args, target, donated, compiler_options)
            programs.append(program)
    answers = compile_programs(programs, names=names, cache=cache, progress=log)
    rows = []
    compiled = zip(steps * len(targets), names, programs, answers, strict=True)
    for (policy, *_), name, program, answer in compiled:
        log.say(f"reading {name}")
        rows.append(read_answer(str(policy), program, answer))
    return StepReport(tuple(rows))
