"""Primitives that return their operand, and that each compiler sees in its own way."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

as_nothing: Any = mlir.lower_fun(lambda x: x, multiple_results=False)
"""Lowers to the operand itself."""
as_barrier: Any = mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
"""Lowers to a barrier, through which no compiler looks."""


def identity_primitive(
    name: str, lowerings: Mapping[str, Callable[..., Any]]
) -> Primitive:
    """Makes a primitive that is an identity: differentiated, and batched.

    Its cotangents pass as they are.

    Args:
      name: of the primitive.
      lowerings: a lowering rule for each platform on which it is more than nothing.
    """
    primitive = Primitive(name)
    primitive.def_impl(_identity)
    primitive.def_abstract_eval(_identity)
    ad.deflinear2(primitive, lambda cotangent, _: [cotangent])
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, as_nothing)
    for platform, lowering in lowerings.items():
        mlir.register_lowering(primitive, lowering, platform=platform)
    return primitive


def _identity(x: Any) -> Any:
    return x
