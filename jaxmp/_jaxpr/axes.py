"""Named axes of a mesh: which are bound, what varies and what is divided along them."""

from typing import TypeAlias

import jax
from jax.sharding import PartitionSpec

from jaxmp._jaxpr.types import Array
from jaxmp.errors import UnknownAxis

AxisName: TypeAlias = str | tuple[str, ...]
"""One name, or several whose devices act together."""

BIND_IT = (
    "Call it in jax.shard_map(fn, mesh=mesh, ...) over a mesh with this axis, or in "
    "jax.pmap(fn, axis_name=...). Under jit with sharded arrays no axis is named: JAX "
    "sees all devices at once, and sums over them where the program does."
)


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """Lists the names of one axis or several."""
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def bound_size(axis_name: AxisName, caller: str, repair: str = BIND_IT) -> int:
    """Returns over how many devices an axis goes.

    Args:
      axis_name: one or several names.
      caller: the function that needs it, for the error.
      repair: what to write instead.

    Raises:
      UnknownAxis: if `shard_map`, `pmap` or `vmap` binds no axis of that name here.
    """
    size = 1
    for name in axis_names(axis_name):
        if not is_bound(name):
            bound = ", ".join(map(repr, manual_axes())) or "none"
            raise UnknownAxis(
                f"{caller} names the axis {name!r}, which is not bound here (bound by "
                f"the mesh: {bound}). {repair}"
            )
        size *= jax.lax.axis_size(name)
    return size


def is_bound(name: str) -> bool:
    """Whether collectives may name this axis here."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def manual_axes() -> tuple[str, ...]:
    """The axes that `shard_map` and `pmap` around this line have bound."""
    return tuple(map(str, jax.sharding.get_abstract_mesh().manual_axes))


def varying_axes(x: Array) -> frozenset[str]:
    """The bound axes along which an array may differ, as far as JAX keeps count."""
    aval = jax.typeof(x)
    kept = getattr(aval, "mat", None)
    return getattr(aval, "vma", frozenset()) if kept is None else kept.varying


def counts_varying(name: str) -> bool:
    """Whether JAX keeps count of what varies here: `shard_map` with `check_vma`."""
    return name in varying_axes(jax.lax.axis_index(name))


def to_varying(x: Array, names: tuple[str, ...]) -> Array:
    """Lets an array vary along axes; no change where JAX keeps no count.

    The transposition of this is a sum over the axes, in the dtype of `x`.
    """
    missing = tuple(n for n in names if counts_varying(n) and n not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


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
