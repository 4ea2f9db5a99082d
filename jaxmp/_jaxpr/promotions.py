"""Tells a cast to float32 that the program asks for from one that JAX put in.

`half * single` in `jax.numpy` casts the half operand. That is no wish of the program's,
unlike `half.astype(jnp.float32)`.
"""

import functools
from typing import Any

from jaxmp._jaxpr.sources import written

# What a program calls to cast; one is among the callers of every cast it asks for.
_CASTS = frozenset(("astype", "_astype", "array", "asarray", "convert_element_type"))
# What promotes its operands, without a trace of the function that does it for them.
_INLINED = frozenset(("ufunc.__call__", "power"))


def is_promotion(eqn: Any) -> bool:
    """Whether JAX made a `convert_element_type` to bring operands to one dtype.

    A cast of which it is not known where it was made was asked for.
    """
    traceback = eqn.source_info.traceback
    return traceback is not None and _is_promotion(traceback)


@functools.lru_cache(maxsize=4096)
def _is_promotion(traceback: Any) -> bool:
    names = written(traceback).inside_jax
    if not _CASTS.isdisjoint(names):
        return False
    return any(name.startswith("promote_") or name in _INLINED for name in names)
