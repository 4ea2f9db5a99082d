"""The dimension numbers of a matmul of which `vmap` has batched an operand or both."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

DimensionNumbers: TypeAlias = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]
"""As `jax.lax.dot_general` takes them: what is contracted, and what is batched."""


def batched(
    numbers: DimensionNumbers, has_axis: tuple[bool, bool], lhs_rank: int
) -> tuple[DimensionNumbers, int]:
    """The matmul of operands whose new axis, if they have one, is the first.

    Args:
      numbers: of the matmul without it.
      has_axis: which of the operands has it.
      lhs_rank: the rank of the left operand without it.

    Returns:
      The dimension numbers, and the position of the new axis in the result.
    """
    lhs_has, rhs_has = has_axis
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    contract = _moved(lhs_contract, lhs_has), _moved(rhs_contract, rhs_has)
    batch = _moved(lhs_batch, lhs_has), _moved(rhs_batch, rhs_has)
    if lhs_has and rhs_has:
        return (contract, ((0, *batch[0]), (0, *batch[1]))), 0
    free = lhs_rank - len(contract[0]) - len(batch[0])
    position = len(batch[0]) + (free if rhs_has else 0)
    return (contract, batch), position


def _moved(axes: Sequence[int], has_axis: bool) -> tuple[int, ...]:
    """Axes behind a new first one, if there is one."""
    return tuple(axis + has_axis for axis in axes)


def all_at_front(
    values: Sequence[Any], axes: Sequence[int | None]
) -> tuple[list[Any], bool]:
    """Arrays that belong together, their new axis first: all have it, or none.

    Returns:
      The arrays, and whether they have it.
    """
    sizes = {
        x.shape[axis] for x, axis in zip(values, axes, strict=True) if axis is not None
    }
    if not sizes:
        return list(values), False
    (size,) = sizes
    return [
        jnp.broadcast_to(x, (size, *x.shape))
        if axis is None
        else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(values, axes, strict=True)
    ], True
