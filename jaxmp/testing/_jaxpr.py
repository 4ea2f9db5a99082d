"""Equations of a jaxpr, those of inner jaxprs included."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

MATMULS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def equations(jaxpr: Any, scope: str = "") -> Iterator[tuple[str, Any]]:
    """Iterates over all equations of a jaxpr, and of those inside of it.

    Args:
      jaxpr: what `jax.make_jaxpr(fun)(*args)` or `jitted.trace(*args).jaxpr` is.
      scope: what the name stacks are put after.

    Returns:
      An iterator of pairs: an equation's name stack, from the outermost jaxpr on, and
      the equation; one that holds a jaxpr, such as a scan, comes before those inside.

    Example:
      >>> import jax
      >>> from jaxmp.testing import equations
      >>> jaxpr = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0)
      >>> [equation.primitive.name for _, equation in equations(jaxpr)]
      ['jit', 'add']
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner_scope = f"{scope}/{equation.source_info.name_stack}".strip("/")
        yield inner_scope, equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    yield from equations(inner, inner_scope)


class Matmul(NamedTuple):
    """A matrix multiplication or convolution in a jaxpr."""

    primitive: str
    operands: tuple[np.dtype, ...]
    output: np.dtype
    scope: str


def matmuls(jaxpr: Any) -> list[Matmul]:
    """Lists the matrix multiplications and convolutions of a jaxpr.

    Args:
      jaxpr: what `jax.make_jaxpr(fun)(*args)` returned.

    Returns:
      One entry for each, however deep inside of loops and jitted functions, with the
      dtypes of its operands and of its result and the name stack it was traced in.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.testing import matmuls
      >>> a = jnp.ones((2, 2), jnp.bfloat16)
      >>> [str(m.output) for m in matmuls(jax.make_jaxpr(jnp.dot)(a, a))]
      ['bfloat16']
    """
    return [
        Matmul(
            equation.primitive.name,
            tuple(v.aval.dtype for v in equation.invars[:2]),
            equation.outvars[0].aval.dtype,
            scope,
        )
        for scope, equation in equations(jaxpr)
        if equation.primitive.name in MATMULS
    ]
