"""Calls outside `jax.jit`: compiled as a whole, once for programs that are equal.

An eager call traces its function anew, as eager JAX runs it anew: what it closes over
may have changed. What has been traced is compiled if no equal program has been; the
arrays that it closes over are arguments.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core

from jaxmp._jaxpr.types import Array, Jaxpr
from jaxmp.casting.ops import _registry
from jaxmp.casting.planner._constants import Constants

_CALLBACK = re.compile(r"(callback|debug_print)\[")


class _Program:
    """A traced function, equal to others that compute the same.

    Two jaxprs of the same text do, with the name scopes and source lines that decide on
    dtypes: what the text leaves out is how to differentiate them, which does not happen
    here, and which function a callback calls.
    """

    def __init__(self, jaxpr: Jaxpr, text: str, dtype: Any):
        self.jaxpr = jaxpr
        constants = Constants(dtype, jaxpr.jaxpr, jaxpr.consts)
        unfit = constants.unfit(jaxpr.jaxpr.constvars, dtype)
        self._key = text, unfit, _registry.version()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def is_eager(jaxpr: Jaxpr, arrays: Sequence[Any]) -> bool:
    """Whether nothing that a traced function takes or closes over is traced itself."""
    return not any(isinstance(x, jax.core.Tracer) for x in (*jaxpr.consts, *arrays))


def compiled(
    execute: Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]], dtype: Any
) -> Callable[[Any, Sequence[Any]], list[Any]]:
    """Returns `run(jaxpr, arrays)`, which compiles eager calls.

    Args:
      execute: `execute(jaxpr, consts, arrays)` runs a jaxpr's plan.
      dtype: the compute dtype.
    """

    def autocasted(
        program: _Program, consts: Sequence[Array], arrays: Sequence[Array]
    ) -> list[Array]:
        return execute(program.jaxpr, consts, arrays)

    jitted = jax.jit(autocasted, static_argnums=0)

    def run(jaxpr: Jaxpr, arrays: Sequence[Array]) -> list[Array]:
        if is_eager(jaxpr, arrays):
            text = jaxpr.pretty_print(source_info=True, name_stack=True)
            if not _CALLBACK.search(text):
                program = _Program(jaxpr, text, dtype)
                return jitted(program, jaxpr.consts, arrays)
        return execute(jaxpr, jaxpr.consts, arrays)

    return run
