"""Partition specs: which mesh axes each dimension of an array is divided over."""

from collections.abc import Iterable

import jax
from jax.sharding import PartitionSpec

from jaxmp._tree import PyTree
from jaxmp.errors import PartitionMismatch


def dimension_axes(spec: PartitionSpec, ndim: int = 0) -> list[tuple[str, ...]]:
    """Lists the axes of each dimension; an empty tuple where it is not divided.

    Args:
      spec: of an array.
      ndim: dimensions of the array; those that the spec leaves out are not divided.
    """
    found = []
    for entry in spec:
        if entry is None or entry is PartitionSpec.UNCONSTRAINED:
            found.append(())
        else:
            found.append(entry if isinstance(entry, tuple) else (entry,))
    return found + [()] * (ndim - len(found))


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
