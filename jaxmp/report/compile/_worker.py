"""The process that compiles.

It reads names of files from its input, one per line. Each holds a pickled `Request`;
the answer, a pickled `Answer`, is written beside it, and the name is printed.
"""

import os
import pickle
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export

from jaxmp.report.compile._mlir_bytes import lower_module
from jaxmp.report.compile.targets import target_devices

MEMORY = ("argument", "output", "alias", "temp", "generated_code")


class Request(NamedTuple):
    """A program, and what to compile it for.

    Attributes:
      target: name of the target, with the number of devices if that is not one.
      written: the program.
      is_exported: whether `jax.export` wrote it.
      donated: whether each argument is.
      mesh: names, sizes and types of the axes that the program is sharded over.
      options: of the compiler, by name.
    """

    target: str
    written: bytes
    is_exported: bool
    donated: tuple[bool, ...]
    mesh: tuple[tuple[str, int, str], ...]
    options: tuple[tuple[str, Any], ...] = ()


class Answer(NamedTuple):
    """What a compiler said.

    Attributes:
      memory: bytes by kind: `argument`, `output`, `alias`, `temp`, `generated_code`.
      costs: `flops` and `bytes accessed`, if the compiler tells them.
      text: the compiled program; empty if its compiler cannot write it down.
      seconds: how long the compiler took.
      error: what it said where it failed; else empty.
    """

    memory: dict[str, int]
    costs: dict[str, float]
    text: str
    seconds: float
    error: str = ""


def compile_request(request: Request) -> Answer:
    """Compiles one program in this process."""
    lower = _lower_exported if request.is_exported else _lower_module
    lowered = lower(request, target_devices(request.target))
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(request.options))
    except jax.errors.JaxRuntimeError as error:
        return Answer({}, {}, "", time.perf_counter() - start, str(error))
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in MEMORY}
    told = compiled.cost_analysis() or {}
    costs = {k: told[k] for k in ("flops", "bytes accessed") if told.get(k, -1) > 0}
    return Answer(memory, costs, program_text(compiled), seconds)


def _lower_module(request: Request, devices: Sequence[Any]) -> Any:
    return lower_module(request.written, request.donated, devices[0])


def _lower_exported(request: Request, devices: Sequence[Any]) -> Any:
    exported = export.deserialize(bytearray(request.written))
    axes = request.mesh or (("devices", exported.nr_devices, "Auto"),)
    names, sizes, types = zip(*axes, strict=True)
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(sizes),
        names,
        axis_types=tuple(jax.sharding.AxisType[name] for name in types),
    )
    jitted = jax.jit(
        exported.call,
        in_shardings=exported.in_shardings_jax(mesh),
        donate_argnums=tuple(i for i, x in enumerate(request.donated) if x),
        keep_unused=True,
    )
    return jitted.lower(*exported.in_avals)


def program_text(compiled: jax.stages.Compiled) -> str:
    """A compiled program; empty if its compiler cannot write it down.

    libtpu fails at asynchronous operations of large programs for the TPU v6e.
    """
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


def main() -> None:
    """Answers requests until there are no more."""
    # The compilers write to the standard output too; answers go where it was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        path = Path(line.strip())
        try:
            answer = compile_request(Request(*pickle.loads(path.read_bytes())))
        except Exception:
            answer = Answer({}, {}, "", 0.0, traceback.format_exc())
        path.with_suffix(".answer").write_bytes(pickle.dumps(tuple(answer)))
        print(path, file=answers, flush=True)
