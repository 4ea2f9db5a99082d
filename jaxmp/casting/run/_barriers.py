"""A barrier that only the compiler for CPUs sees.

XLA for CPUs (jaxlib 0.10 and 0.12) merges a transpose into a matmul of bfloat16 that
returns float32, and then has no kernel for it: "Unsupported element type for
DotThunk". Such a matmul stands between barriers there.
"""

import jax

from jaxmp.casting.run._identity import as_barrier, identity_primitive

_barrier = identity_primitive("cpu_barrier", {"cpu": as_barrier})


def cpu_barrier(x: jax.Array) -> jax.Array:
    """Returns an array, whose computations compilers for CPUs do not look through."""
    return _barrier.bind(x)
