"""Rows of a float32 table, read in half.

The rows are the same whether they are rounded before or after they are looked up, and
so are their gradients, which are added up in float32. On one device they are rounded
after: the table may be large, and few of its rows are read. On several devices, which
gather a table that is divided among them, it is gathered in half, in one copy for the
lookup and the matmul that reads the same table.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.calls import JITS, body
from jaxmp._jaxpr.execution import bind, evaluate
from jaxmp._jaxpr.types import Array, Eqn
from jaxmp.casting.run._gradient_of_stored import of_stored
from jaxmp.casting.run._many_devices import one_or_many, sum_apart


def look_up(eqn: Eqn, half: Array, table: Array, rest: Sequence[Array]) -> Array:
    """Carries out a gather, or a `jit` around one, and returns the rows in half.

    Args:
      eqn: the equation; its first operand is the table.
      half: the table in half. It gets no gradient.
      table: the table as it is stored, which gets it.
      rest: the other operands: indices.
    """
    dtype = jnp.result_type(half)

    def one(half: Array, table: Array, *rest: Array) -> Array:
        return bind(eqn, [table, *rest])[0].astype(dtype)

    def many(half: Array, table: Array, *rest: Array) -> Array:
        return _bind_in_half(eqn, [half, *rest])[0]

    def tangent(tangent: Array, table: Array, *rest: Array) -> Array:
        def stored(table: Array) -> Array:
            return bind(eqn, [table, *rest])[0]

        return jax.jvp(stored, (table,), (sum_apart(tangent),))[1]

    value = functools.partial(one_or_many, one, many)
    return of_stored(value, tangent, half, table, *rest)


def _bind_in_half(eqn: Eqn, operands: Sequence[Array]) -> list[Array]:
    """Carries out an equation whose operands are partly in half, all of it in half."""
    if eqn.primitive.name in JITS:
        return evaluate(body(eqn), operands, _bind_in_half)
    halves = {jnp.result_type(x) for x in operands} & _tree.HALF
    if halves and eqn.primitive.name != "convert_element_type":
        (dtype,) = halves
        operands = [_narrow(x, dtype) for x in operands]
    return bind(eqn, operands)


def _narrow(x: Any, dtype: np.dtype) -> Any:
    is_wide = jnp.result_type(x) == _tree.FLOAT32
    return jax.lax.convert_element_type(x, dtype) if is_wide else x
