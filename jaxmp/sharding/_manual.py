"""Gathering one weight in `jax.shard_map`, and reducing its gradient back."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxmp import _tree
from jaxmp._jaxpr.axes import counts_varying, dimension_axes, to_varying, varying_axes
from jaxmp._jaxpr.types import Array
from jaxmp.errors import PartitionMismatch


class Settings(NamedTuple):
    """What all weights have in common."""

    axes: tuple[str, ...]
    compute_dtype: np.dtype
    reduce_dtype: np.dtype
    divisor: int


class _Plan(NamedTuple):
    """How one weight is gathered: hashable, so that it can be a static argument."""

    gathered: tuple[tuple[int, tuple[str, ...]], ...]
    """Dimensions, each with the axes that it is sharded over, the major one first."""
    summed: tuple[str, ...]
    """The axes along which every device has the whole weight."""
    param_dtype: np.dtype
    compute_dtype: np.dtype
    reduce_dtype: np.dtype
    divisor: int

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes over which its gradient is summed."""
        return (*(n for _, names in self.gathered for n in names), *self.summed)


def gather(path: Any, x: Any, spec: PartitionSpec, settings: Settings) -> Any:
    """Casts one shard and gathers it.

    Args:
      path: of the weight, for errors.
      x: its shard on this device, of any dtype.
      spec: how it is sharded.
      settings: what all weights have in common.

    Raises:
      PartitionMismatch: if the spec does not fit, or what stays sharded would not be
        a block of the weight.
    """
    if not _tree.is_array(x):
        return x
    gathered = _dimensions(path, x, spec, settings.axes)
    if not _tree.is_inexact(x):
        return _gathered(jnp.asarray(x), gathered)
    sharded = {name for _, names in gathered for name in names}
    whole = (n for n in settings.axes if n not in sharded)
    summed = tuple(n for n in whole if not _differs(x, n))
    is_cast = _tree.is_castable(x)
    plan = _Plan(
        gathered,
        summed,
        x.dtype,
        settings.compute_dtype if is_cast else x.dtype,
        settings.reduce_dtype if is_cast else x.dtype,
        settings.divisor,
    )
    return _gather_in_half(plan, jnp.asarray(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_in_half(plan: _Plan, x: Array) -> Array:
    half = _gathered(x.astype(plan.compute_dtype), plan.gathered)
    return to_varying(half, plan.summed)


def _forward(plan: _Plan, x: Array) -> tuple[Array, None]:
    return _gather_in_half(plan, x), None


def _backward(plan: _Plan, _: None, cotangent: Array) -> tuple[Array]:
    part = _tree.at_least_float32(to_varying(cotangent, plan.axes))
    part = (part / plan.divisor).astype(plan.reduce_dtype)
    for dimension, names in reversed(plan.gathered):
        part = jax.lax.psum_scatter(
            part, names, scatter_dimension=dimension, tiled=True
        )
    if plan.summed:
        part = jax.lax.psum(part, plan.summed)
    return (part.astype(plan.param_dtype),)


_gather_in_half.defvjp(_forward, _backward)


def _gathered(x: Array, gathered: tuple[tuple[int, tuple[str, ...]], ...]) -> Array:
    for dimension, names in gathered:
        x = jax.lax.all_gather(x, names, axis=dimension, tiled=True)
    return x


def _differs(x: Any, name: str) -> bool:
    """Whether JAX knows that a weight differs along an axis that its spec leaves out.

    Its gradients are then the device's own; `replicated` makes such weights.
    """
    return counts_varying(name) and name in varying_axes(x)


def _dimensions(
    path: Any, x: Any, spec: PartitionSpec, axes: tuple[str, ...]
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    if len(spec) > np.ndim(x):
        raise PartitionMismatch(
            f"The weight {_tree.path_string(path)!r} has the shape {np.shape(x)} and "
            f"the spec {spec}, which has {len(spec)} entries. Pass the spec that it "
            "came in with, one entry for each of its dimensions at most."
        )
    found = []
    for dimension, names in enumerate(dimension_axes(spec)):
        taken = tuple(n for n in names if n in axes)
        if names[len(names) - len(taken) :] != taken:
            raise PartitionMismatch(
                f"Dimension {dimension} of the weight {_tree.path_string(path)!r} is "
                f"sharded over {names}, and without {taken} what is left on a device "
                f"is not one block of it. Name {taken} last in the spec, or gather "
                f"over {names}."
            )
        if taken:
            found.append((dimension, taken))
    return tuple(found)
