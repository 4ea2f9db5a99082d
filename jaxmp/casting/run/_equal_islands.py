"""Finds islands that are the same, so that JAX differentiates each of them once.

The blocks of a network repeat their islands. JAX keeps what it derives from a function
under `jax.checkpoint` with the function; islands that share one share its gradient.
"""

from collections.abc import Hashable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.calls import is_jaxpr
from jaxmp._jaxpr.scopes import stack_parts
from jaxmp._jaxpr.types import Atom
from jaxmp.casting.islands._islands import Island


def common_scope(island: Island) -> tuple[Any, ...]:
    """The parts of the name stack that all equations of an island are under."""
    shared, *stacks = (stack_parts(plan.eqn) for plan in island.members)
    for other in stacks:
        length = 0
        for mine, theirs in zip(shared, other, strict=False):
            if mine != theirs:
                break
            length += 1
        shared = shared[:length]
    return shared


def signature(island: Island, depth: int, args: list[Any]) -> Hashable | None:
    """Returns equal keys for islands that do the same; None for one of a kind.

    Args:
      island: the operations.
      depth: how many of their name scopes are left out, being those of all of them.
      args: values of its inputs.
    """
    numbers: dict[Any, int] = {v: i for i, v in enumerate(island.inputs)}

    def number(atom: Atom) -> Hashable:
        if is_literal(atom):
            return "literal", str(atom.aval), np.asarray(atom.val).tobytes()
        return numbers.setdefault(atom, len(numbers))

    parts: list[Any] = [(jnp.shape(x), jnp.result_type(x)) for x in args]
    for plan in island.members:
        eqn = plan.eqn
        if eqn.effects:
            return None
        parts.append(
            (
                eqn.primitive,
                tuple(map(number, eqn.invars)),
                tuple(map(number, eqn.outvars)),
                tuple(v.aval for v in eqn.outvars),
                _parameters(eqn.params if plan.params is None else plan.params),
                plan.in_dtypes,
                id(plan.call),
                eqn.ctx,
                stack_parts(eqn)[depth:],
                eqn.source_info.traceback,
            )
        )
    parts.append(tuple((numbers[v], dtype) for v, dtype in island.outputs))
    key = tuple(parts)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _parameters(params: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    # A jaxpr, such as the body of a jitted function, is what it is by identity.
    return tuple(
        (name, (id(value), type(value)) if is_jaxpr(value) else value)
        for name, value in sorted(params.items())
    )
