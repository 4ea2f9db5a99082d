"""Barriers that only the compilers of some platforms see.

XLA for GPUs would rather keep a value in float32 than compute it again, because it
recognises the computation that is repeated; for TPUs it chooses well by itself, and a
barrier only costs it fusions.

XLA for CPUs (jaxlib 0.10 and 0.12) merges a transpose into a matmul of bfloat16 that
returns float32, and then has no kernel for it: "Unsupported element type for
DotThunk". Such a matmul stands between barriers there.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def _barrier(name: str, platforms: Sequence[str]) -> Primitive:
    """A primitive that is a barrier on some platforms, and nothing on others."""
    primitive = Primitive(name)
    primitive.def_impl(_as_nothing)
    primitive.def_abstract_eval(_as_nothing)
    ad.deflinear2(primitive, lambda cotangent, _: [cotangent])
    batching.defvectorized(primitive)
    nothing: Any = mlir.lower_fun(_as_nothing, multiple_results=False)
    mlir.register_lowering(primitive, nothing)
    for platform in platforms:
        rule: Any = mlir.lower_fun(_as_barrier, multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _as_nothing(x: Any) -> Any:
    return x


def _as_barrier(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x)


_gpu = _barrier("gpu_barrier", ("cuda", "rocm"))
_cpu = _barrier("cpu_barrier", ("cpu",))


def gpu_barrier(x: jax.Array) -> jax.Array:
    """Returns an array, whose computations compilers for GPUs do not look through."""
    return _gpu.bind(x)


def cpu_barrier(x: jax.Array) -> jax.Array:
    """Returns an array, whose computations compilers for CPUs do not look through."""
    return _cpu.bind(x)
