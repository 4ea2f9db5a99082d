"""Finds the FP8 metadata in a tree: leaves whose gradient is their new value.

Flax's float8 layers keep scales and histories of magnitudes. In linen's variables they
stand under the key `_overwrite_with_gradient`. An nnx model that holds a linen layer
(`flax.nnx.bridge.ToNNX`) has them in variables of a type of that name. What an
`nnx.Optimizer` shows its transformation has lost keys and types; there the six
variables of an FP8 operation are known by their names, all in one place.
"""

from typing import Any

import jax

from jaxmp._jaxpr.flax_internals import FP8_VARIABLES, OVERWRITE_WITH_GRADIENT

Names = tuple[Any, ...]


def overwritten(tree: Any, collection: str = OVERWRITE_WITH_GRADIENT) -> list[bool]:
    """Tells which leaves of a tree are FP8 metadata.

    Args:
      tree: parameters or gradients: any pytree.
      collection: the key under which, or the type of nnx variables in which it stands.

    Returns:
      One boolean for each leaf, in the order of `jax.tree.leaves`.
    """

    def is_of_type(x: Any) -> bool:
        return type(x).__name__ == collection

    nodes = [
        (_names(path), node)
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_of_type)
    ]
    is_flax = collection == OVERWRITE_WITH_GRADIENT
    operations = _operations([names for names, _ in nodes]) if is_flax else set()
    return [
        is_of_type(node) or collection in names or names[:-1] in operations
        for names, node in nodes
        for _ in jax.tree.leaves(node)
    ]


def _operations(leaves: list[Names]) -> set[Names]:
    """The places that hold all variables of an FP8 operation, and nothing else."""
    found: dict[Names, set[Any]] = {}
    for names in leaves:
        if names:
            found.setdefault(names[:-1], set()).add(names[-1])
    return {place for place, names in found.items() if names == FP8_VARIABLES}


def _names(path: tuple[Any, ...]) -> Names:
    """The keys of a path, without the attribute in which an nnx variable has it."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return tuple(getattr(key, "key", getattr(key, "name", key)) for key in path)
