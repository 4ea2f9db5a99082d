"""Partition specs: how they are made, and given to every weight of a tree."""

from collections.abc import Iterable

import jax
from jax.sharding import PartitionSpec

from jaxmp._tree import PyTree
from jaxmp.errors import PartitionMismatch


def spec_of(dimensions: Iterable[tuple[str, ...]]) -> PartitionSpec:
    """Makes the spec that `dimension_axes` reads, without entries that say nothing."""
    entries = [
        (names[0] if len(names) == 1 else names) if names else None
        for names in dimensions
    ]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def broadcast_prefix(prefix: PyTree, params: PyTree, name: str, repair: str) -> PyTree:
    """Gives every weight the spec or sharding that a prefix of its tree has.

    Args:
      prefix: the specs or shardings.
      params: the weights.
      name: what the prefix is called, for an error.
      repair: what to pass instead.

    Raises:
      PartitionMismatch: if it is no prefix of the weights.
    """
    try:
        return jax.tree.broadcast(prefix, params)
    except ValueError as error:
        difference = " ".join(str(error).split())
        raise PartitionMismatch(
            f"{name} is neither like the weights nor a prefix of them. {repair} JAX "
            f"says: {difference}"
        ) from None
