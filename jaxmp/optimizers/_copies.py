"""Finds copies of the weights in an optimizer's state, and replaces them by new ones.

DoG, Prodigy, Mechanize, schedule-free averages and `ema` keep the first weights. Their
values distinguish copies from moments: under one prefix of the state's paths, every
array equals the weight of the same path bit for bit, and the arrays are not all one
constant, as zeros would be beside weights of zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._tree import PyTree


class Weights(NamedTuple):
    """The weights whose copies a state may hold, before and after the change."""

    old: PyTree
    new: PyTree


def replace_copies(state: PyTree, weights: Weights) -> PyTree:
    """Replaces copies of the old weights by the new ones.

    Args:
      state: state of an optimizer, of any structure.
      weights: two trees of one structure, as the optimizer sees them.

    Returns:
      The state; all other arrays are returned unchanged.
    """
    old = _by_path(weights.old)
    new = _by_path(weights.new)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    groups: dict[Any, list[tuple[int, Any]]] = {}
    for i, (path, x) in enumerate(leaves):
        found = _suffix(path, old)
        if found is not None and _same_type(x, old[found]):
            prefix = path[: len(path) - len(found)]
            groups.setdefault(prefix, []).append((i, found))
    values = [x for _, x in leaves]
    for members in groups.values():
        copied = [(values[i], old[path]) for i, path in members]
        is_copy = _are_copies(copied)
        for i, path in members:
            fresh = _tree.like(new[path], values[i])
            values[i] = _tree.select(is_copy, fresh, values[i])
    return jax.tree.unflatten(structure, values)


def _by_path(tree: PyTree) -> dict[Any, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path: x for path, x in leaves if _tree.is_inexact(x)}


def _suffix(path: Any, known: dict[Any, Any]) -> Any:
    """The longest suffix of a path that is the path of a weight."""
    suffixes = (path[i:] for i in range(len(path) + 1))
    return next((suffix for suffix in suffixes if suffix in known), None)


def _same_type(x: Any, weight: Any) -> bool:
    same = _tree.is_array(x) and x.shape == weight.shape
    return same and x.dtype == weight.dtype


def _are_copies(pairs: list[tuple[Any, Any]]) -> jax.Array:
    equal = [jnp.all(x == weight) for x, weight in pairs]
    arrays = [x for x, _ in pairs if x.size]
    if not arrays:
        return jnp.bool_(False)
    first = arrays[0].ravel()[0]
    varies = [jnp.any(x != first.astype(x.dtype)) for x in arrays]
    return jnp.all(jnp.stack(equal)) & jnp.any(jnp.stack(varies))
