"""Sums of losses and gradients over parts of a batch, in float32 at least."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.fp8_metadata import overwritten
from jaxmp._tree import PyTree


class Form(NamedTuple):
    """What one part returns: a loss and gradients, as a list of leaves.

    A float0 has no values, and no loop can carry it: the list leaves it out.

    Attributes:
      structure: of the tree `(loss, grads)`.
      paths: of all of its leaves.
      float0: the shape of each leaf that is left out, None for the others.
      summed: for each leaf of the list, whether parts are added up. FP8 metadata is
        the new value itself.
    """

    structure: Any
    paths: list[Any]
    float0: list[tuple[int, ...] | None]
    summed: list[bool]

    def tree(self, leaves: Sequence[jax.Array]) -> PyTree:
        """The tree of all leaves again."""
        rest = iter(leaves)
        return self.tree_of(
            [
                next(rest) if shape is None else np.zeros(shape, jax.dtypes.float0)
                for shape in self.float0
            ]
        )

    def tree_of(self, values: Sequence[Any]) -> PyTree:
        """A tree of the same structure, with a value for each leaf."""
        return jax.tree.unflatten(self.structure, values)


def listed(tree: PyTree) -> tuple[list[Any], Form]:
    """Lists the leaves that have values, and how to make the tree of them again."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path for path, _ in found]
    float0 = [x.shape if x.dtype == jax.dtypes.float0 else None for _, x in found]
    kept = [
        (x, is_metadata)
        for (_, x), is_metadata in zip(found, overwritten(tree), strict=True)
        if x.dtype != jax.dtypes.float0
    ]
    summed = [
        jnp.issubdtype(x.dtype, jnp.inexact) and not is_metadata
        for x, is_metadata in kept
    ]
    return [x for x, _ in kept], Form(structure, paths, float0, summed)


def total_dtype(x: Any) -> Any:
    """The dtype in which values of the dtype of `x` are added up."""
    return jnp.float32 if x.dtype in _tree.HALF else x.dtype


def add(totals: list[Any], results: list[Any], summed: list[bool]) -> list[Any]:
    """Adds the results of a part; FP8 metadata is the largest, the rest the last."""

    def combined(total: Any, x: Any, is_summed: bool) -> Any:
        if is_summed:
            return total + x.astype(total.dtype)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.maximum(total, x.astype(total.dtype))  # scales, magnitudes: >= 0
        return x

    return list(map(combined, totals, results, summed))


def divided(x: jax.Array, count: int) -> jax.Array:
    """A sum over some parts, divided by their number in its own dtype."""
    return x / np.asarray(count, x.dtype)
