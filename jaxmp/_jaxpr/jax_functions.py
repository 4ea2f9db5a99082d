"""Which of JAX's own functions an equation was written in: casts, special functions."""

import functools
from typing import Any

from jaxmp._jaxpr.sources import Written, written
from jaxmp._jaxpr.types import Eqn

# What a program calls to cast; one is among the callers of every cast it asks for.
_CASTS = frozenset(("astype", "_astype", "array", "asarray", "convert_element_type"))
# What promotes its operands, without a trace of the function that does it for them.
_INLINED = frozenset(("ufunc.__call__", "power"))
_OPERATOR = "_operator_"
_SOURCES = "/jax/_src/"


def asks_for_cast(how: Written) -> bool:
    """Whether a program called one of JAX's casts, as `x.astype` does."""
    return not _CASTS.isdisjoint(how.inside_jax)


def promotes(how: Written) -> bool:
    """Whether one of JAX's promotions to a common dtype is on the stack."""
    return any(name.startswith("promote_") for name in how.inside_jax)


def is_promotion(eqn: Eqn) -> bool:
    """Tells a cast that JAX put in from one that the program asks for.

    `half * single` in `jax.numpy` casts the half operand. The program did not
    ask for it, unlike `half.astype(jnp.float32)`. A cast of which it is not known where
    it was made was asked for.

    Args:
      eqn: a `convert_element_type`.
    """
    traceback = eqn.source_info.traceback
    return traceback is not None and _is_promotion(traceback)


@functools.lru_cache(maxsize=4096)
def _is_promotion(traceback: Any) -> bool:
    how = written(traceback)
    is_inlined = any(
        name in _INLINED or name.startswith(_OPERATOR) for name in how.inside_jax
    )
    return not asks_for_cast(how) and (promotes(how) or is_inlined)


def is_in_special_function(eqn: Eqn) -> bool:
    """Whether an equation was written in `jax.scipy.special` or `jax.scipy.stats`.

    What these call back, such as a function of the user's, is not written there.
    """
    traceback = eqn.source_info.traceback
    return traceback is not None and _is_special(traceback)


@functools.lru_cache(maxsize=4096)
def _is_special(traceback: Any) -> bool:
    for frame in traceback.frames:
        _, in_jax, module = frame.file_name.replace("\\", "/").rpartition(_SOURCES)
        if not in_jax:
            return False
        if module.startswith("scipy/"):
            return module.startswith(("scipy/special", "scipy/stats/"))
    return False
