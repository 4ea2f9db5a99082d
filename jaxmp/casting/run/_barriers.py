"""A barrier that only the compiler for CPUs sees.

XLA for CPUs (jaxlib 0.10 and 0.12) merges a transpose into a matmul of bfloat16 that
returns float32, and then has no kernel for it: "Unsupported element type for
DotThunk". Such a matmul stands between barriers there.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_barrier = Primitive("cpu_barrier")


def cpu_barrier(x: jax.Array) -> jax.Array:
    """Returns an array, whose computations compilers for CPUs do not look through."""
    return _barrier.bind(x)


def _as_nothing(x: Any) -> Any:
    return x


_nothing: Any = mlir.lower_fun(_as_nothing, multiple_results=False)
_as_barrier: Any = mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
_barrier.def_impl(_as_nothing)
_barrier.def_abstract_eval(_as_nothing)
ad.deflinear2(_barrier, lambda cotangent, _: [cotangent])
batching.defvectorized(_barrier)
mlir.register_lowering(_barrier, _nothing)
mlir.register_lowering(_barrier, _as_barrier, platform="cpu")
