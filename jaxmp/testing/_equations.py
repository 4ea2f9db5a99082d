"""The equations and matmuls of a jaxpr, inner jaxprs included."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxmp._jaxpr.calls import held
from jaxmp._jaxpr.matmuls import operands
from jaxmp._jaxpr.primitives import ALL_MATMULS
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr


def equations(jaxpr: Jaxpr, scope: str = "") -> Iterator[tuple[str, Eqn]]:
    """Iterates over all equations of a jaxpr and of the jaxprs inside it.

    Args:
      jaxpr: from `jax.make_jaxpr(fun)(*args)` or `jitted.trace(*args).jaxpr`.
      scope: a prefix for the name stacks.

    Returns:
      An iterator of pairs: an equation's name stack, starting at the outermost jaxpr,
      and the equation. A call, such as a scan, comes before the equations inside it.

    Example:
      >>> import jax
      >>> from jaxmp.testing import equations
      >>> jaxpr = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0)
      >>> [equation.primitive.name for _, equation in equations(jaxpr)]
      ['jit', 'add']
    """
    for equation in open_jaxpr(jaxpr).eqns:
        inner_scope = f"{scope}/{equation.source_info.name_stack}".strip("/")
        yield inner_scope, equation
        for inner in held(equation):
            yield from equations(inner, inner_scope)


class Matmul(NamedTuple):
    """A matrix multiplication or convolution in a jaxpr.

    Attributes:
      primitive: its name, such as `"dot_general"`.
      operands: the dtypes of its two operands.
      output: the dtype of its result.
      scope: the name stack that it was traced in.
    """

    primitive: str
    operands: tuple[np.dtype, ...]
    output: np.dtype
    scope: str


def matmuls(jaxpr: Jaxpr) -> list[Matmul]:
    """Lists the matrix multiplications and convolutions of a jaxpr.

    Args:
      jaxpr: from `jax.make_jaxpr(fun)(*args)`.

    Returns:
      One entry for each, however deep in loops and jitted functions.

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
            tuple(aval.dtype for aval in operands(equation)),
            equation.outvars[0].aval.dtype,
            scope,
        )
        for scope, equation in equations(jaxpr)
        if equation.primitive.name in ALL_MATMULS
    ]
