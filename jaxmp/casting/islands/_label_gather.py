"""One element of each row, as cross-entropy takes the logit of the label.

The gradient of a gather is a scatter into an array of zeros as large as the logits, in
float32, which no compiler fuses. The same element as a sum over a row that is zero
elsewhere has a gradient that fuses with that of the softmax beside it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.calls import JITS, body
from jaxmp._jaxpr.execution import bind, evaluate
from jaxmp._jaxpr.types import Array, Eqn
from jaxmp._jaxpr.versions import open_jaxpr


def has_pick(eqn: Eqn) -> bool:
    """True for a gather that picks one element per row, or a `jit` around one."""
    if eqn.primitive.name in JITS:
        return any(map(is_pick, open_jaxpr(body(eqn)).eqns))
    return is_pick(eqn)


def is_pick(eqn: Eqn) -> bool:
    """True for a gather that picks one element of each row along the last axis."""
    if eqn.primitive.name != "gather" or castable_dtype(eqn.invars[0]) is None:
        return False
    operand, indices = (v.aval for v in eqn.invars)
    last = operand.ndim - 1
    numbers = eqn.params["dimension_numbers"]
    return (
        last > 0
        and numbers.offset_dims == ()
        and tuple(numbers.start_index_map) == (last,)
        and tuple(numbers.collapsed_slice_dims) == (last,)
        and tuple(numbers.operand_batching_dims) == tuple(range(last))
        and tuple(numbers.start_indices_batching_dims) == tuple(range(last))
        and indices.size == operand.size // operand.shape[last]
        and eqn.params["mode"] is not None
    )


def bind_with_picks(eqn: Eqn, operands: Sequence[Any]) -> list[Any]:
    """Binds an equation for which `has_pick` is true."""
    if eqn.primitive.name not in JITS:
        return [_pick(eqn, *operands)]

    def pick_or_bind(inner: Eqn, operands: Sequence[Array]) -> list[Array]:
        return [_pick(inner, *operands)] if is_pick(inner) else bind(inner, operands)

    return evaluate(body(eqn), operands, pick_or_bind)


def _pick(eqn: Eqn, operand: Any, indices: Any) -> Any:
    width = operand.shape[-1]
    rows = jax.lax.expand_dims(indices.reshape(operand.shape[:-1]), (operand.ndim - 1,))
    mode = eqn.params["mode"]
    if mode == jax.lax.GatherScatterMode.CLIP:
        rows = jnp.clip(rows, 0, width - 1)
    columns = jax.lax.broadcasted_iota(rows.dtype, operand.shape, operand.ndim - 1)
    picked = jnp.sum(jnp.where(columns == rows, operand, 0), axis=-1, keepdims=True)
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = jnp.nan if fill is None else fill
        picked = jnp.where((rows >= 0) & (rows < width), picked, fill)
    return picked.reshape(eqn.outvars[0].aval.shape)
