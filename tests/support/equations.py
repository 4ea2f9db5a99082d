"""The equations that JAX makes of a function."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from jaxmp._jaxpr.types import Eqn
from jaxmp._jaxpr.walk import walk


def equations(fn: Callable[..., Any], *args: Any) -> list[Eqn]:
    """Every equation of a function, those in calls included."""
    return list(walk(jax.make_jaxpr(fn)(*args)))


def equation(
    primitive: str | Collection[str], fn: Callable[..., Any], *args: Any
) -> Eqn:
    """The first equation of a function with a primitive of one of these names."""
    names = (primitive,) if isinstance(primitive, str) else primitive
    found = equations(fn, *args)
    for eqn in found:
        if eqn.primitive.name in names:
            return eqn
    made = [eqn.primitive.name for eqn in found]
    raise AssertionError(f"JAX makes {made} of it, none of which is in {names}.")
