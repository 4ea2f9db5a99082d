"""The process that compiles.

It reads names of files from its input, one per line. Each holds a pickled `Request`.
The process writes a pickled `Answer` beside it, and prints the name.
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

_MEMORY = ("argument", "output", "alias", "temp", "generated_code")


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
      costs: `flops` and `bytes accessed`, if the compiler counts them.
      text: the compiled program; empty if its compiler cannot write it down.
      seconds: how long the compiler took.
      error: what it said if it failed; otherwise empty.
    """

    memory: dict[str, int]
    costs: dict[str, float]
    text: str
    seconds: float
    error: str = ""

    @classmethod
    def failure(cls, error: str, seconds: float = 0.0) -> "Answer":
        """The answer of a compiler that failed."""
        return cls(memory={}, costs={}, text="", seconds=seconds, error=error)

    @property
    def is_out_of_memory(self) -> bool:
        """Whether the program was refused because it does not fit into memory."""
        return "RESOURCE_EXHAUSTED" in self.error


def compile_request(request: Request) -> Answer:
    """Compiles one program in this process."""
    lower = _lower_exported if request.is_exported else _lower_module
    lowered = lower(request, target_devices(request.target))
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(request.options))
    except jax.errors.JaxRuntimeError as error:
        return Answer.failure(str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in _MEMORY}
    counted = compiled.cost_analysis() or {}
    names = ("flops", "bytes accessed")
    costs = {name: counted[name] for name in names if counted.get(name, -1) > 0}
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
            answer = Answer.failure(traceback.format_exc())
        path.with_suffix(".answer").write_bytes(pickle.dumps(tuple(answer)))
        print(path, file=answers, flush=True)
