"""Values that are computed a second time, where XLA would keep the first.

XLA recognises a computation that is repeated. Of an activation such as GELU, which the
backward pass computes again from its half argument, it then keeps float32 parts.

- On GPUs a barrier prevents that.
- On TPUs a barrier would prevent fusions, too. A rounding that changes nothing is as
  good: it is another operation.
- The v5e chooses well by itself, and would keep more with it.

`tests/targets/test_activations.py` prints what it saves on TPUs.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jaxmp._jaxpr.lowering import device_kind
from jaxmp.casting.run._identity import as_barrier, as_nothing, identity_primitive

_CHOOSES_WELL = re.compile("TPU v5 ?(lite|e)")


def anew(x: jax.Array) -> jax.Array:
    """Returns an array; what is computed from it is not merged with anything else."""
    return _anew.bind(x)


def _rounded(x: jax.Array) -> jax.Array:
    if x.dtype not in (jnp.float16, jnp.bfloat16):
        return x
    wide = x.astype(jnp.float32)
    # Of float32's exponent: a float16's would lose the smallest numbers.
    exact = jax.lax.reduce_precision(wide, 8, jnp.finfo(x.dtype).nmant)
    return exact.astype(x.dtype)


_as_rounding: Any = mlir.lower_fun(_rounded, multiple_results=False)


def _lower_for_tpu(context: Any, x: Any) -> Any:
    chooses_well = _CHOOSES_WELL.match(device_kind(context))
    return (as_nothing if chooses_well else _as_rounding)(context, x)


_anew = identity_primitive(
    "anew", {"cuda": as_barrier, "rocm": as_barrier, "tpu": _lower_for_tpu}
)
