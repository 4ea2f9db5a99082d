"""An optimizer's update, compiled for a TPU or an H100, and what its kernels touch."""

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from jaxmp.report import compile_for
from jaxmp.report.compile.targets import TARGET_ENVIRONMENT


def prepare_to_compile() -> None:
    """Keeps JAX on the CPU, so that the compilers of targets can be loaded."""
    os.environ.update(TARGET_ENVIRONMENT)
    jax.config.update("jax_platforms", TARGET_ENVIRONMENT["JAX_PLATFORMS"])


class Weights(NamedTuple):
    """Parameters of one shape.

    Attributes:
      leaves: number of arrays.
      shape: of each of them.
    """

    leaves: int
    shape: tuple[int, int]

    @property
    def parameters(self) -> int:
        return self.leaves * self.shape[0] * self.shape[1]

    def arrays(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        shape = jax.ShapeDtypeStruct(self.shape, dtype)
        return {f"w{i}": shape for i in range(self.leaves)}


def compile_update(
    tx: optax.GradientTransformation,
    weights: Weights,
    target: str,
    *,
    params_dtype: Any,
    grads_dtype: Any,
) -> jax.stages.Compiled:
    """Compiles `(params, state, grads) -> (params, state)`, the first two donated."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = weights.arrays(params_dtype)
    state = jax.eval_shape(tx.init, params)
    grads = weights.arrays(grads_dtype)
    return compile_for(target, step, params, state, grads, donate_argnums=(0, 1))


def bytes_accessed(compiled: jax.stages.Compiled) -> float | None:
    """What a program reads and writes; the H100's compiler does not count it."""
    return (compiled.cost_analysis() or {}).get("bytes accessed")


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


# Kernels of a compiled program


class Kernel(NamedTuple):
    """One instruction of a compiled program that reads and writes memory.

    Attributes:
      operation: such as `fusion`.
      is_entry: whether it runs on every call, not in a branch.
      result: the type of its result, as in the program's text.
      operands: the types of what it reads.
    """

    operation: str
    is_entry: bool
    result: str
    operands: list[str]


_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)")
_OPERATIONS = ("fusion", "copy", "select", "multiply", "add", "reduce", "convert")


def kernels(hlo: str) -> Iterator[Kernel]:
    """Yields the kernels of a program; what is fused into them is left out."""
    fused = set(re.findall(r"calls=%([\w.\-]+)", hlo))
    types: dict[str, str] = {}
    computation, is_entry = "", False
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation, is_entry = header[2], header[1] is not None
        instruction = _INSTRUCTION.match(line)
        if instruction is None or computation in fused:
            continue
        name, result, operation, operands = instruction.groups()
        types[name] = result
        if operation in _OPERATIONS:
            read = [types.get(x, "") for x in re.findall(r"%([\w.\-]+)", operands)]
            yield Kernel(operation, is_entry, result, read)
