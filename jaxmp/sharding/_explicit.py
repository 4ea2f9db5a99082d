"""Gathering weights on a mesh with explicit axes, where types say what is sharded."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmp import _tree
from jaxmp._jaxpr.axes import dimension_axes
from jaxmp._jaxpr.types import Array
from jaxmp._tree import PyTree


class _Plan(NamedTuple):
    """How one weight is gathered: hashable, so that it can be a static argument."""

    sharding: NamedSharding
    """Of the weight, and of its gradient."""
    whole: PartitionSpec
    """Of the gathered weight; JAX hands over its gradients before they are summed."""
    param_dtype: np.dtype
    compute_dtype: np.dtype
    reduce_dtype: np.dtype


def has_axes(params: PyTree, names: tuple[str, ...]) -> bool:
    """Whether all these are explicit axes of the mesh that the weights are on."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [x.sharding.mesh for x in map(_aval, _arrays(params))]
    return any(set(names) <= _explicit_axes(mesh) for mesh in meshes)


def gather(
    params: PyTree,
    names: tuple[str, ...],
    compute_dtype: np.dtype,
    reduce_dtype: np.dtype | None,
) -> PyTree:
    """Casts weights and reshards them, whole along the axes.

    Args:
      params: pytree of weights.
      names: explicit axes of the mesh.
      compute_dtype: what floating weights are cast to.
      reduce_dtype: what their gradients are summed in; None leaves it to JAX.
    """

    def gather_one(x: Any) -> Any:
        if not _tree.is_array(x):
            return x
        is_cast = _tree.is_castable(x)
        sharding = _aval(x).sharding
        dimensions = dimension_axes(sharding.spec, x.ndim)
        gathered = {n for axes in dimensions for n in axes if n in names}
        left = [tuple(n for n in axes if n not in names) for axes in dimensions]
        entries = [axes or None for axes in left]
        if not gathered:
            return x.astype(compute_dtype) if is_cast else x
        if not is_cast or reduce_dtype is None or x.ndim < 2:
            half = x.astype(compute_dtype) if is_cast else x
            return jax.sharding.reshard(half, PartitionSpec(*entries))
        whole = PartitionSpec(*entries, reduced=frozenset(gathered))
        plan = _Plan(sharding, whole, x.dtype, compute_dtype, reduce_dtype)
        return _gather_in_half(plan, x)

    return jax.tree.map(gather_one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_in_half(plan: _Plan, x: Array) -> Array:
    return jax.sharding.reshard(x.astype(plan.compute_dtype), plan.whole)


def _forward(plan: _Plan, x: Array) -> tuple[Array, None]:
    return _gather_in_half(plan, x), None


def _backward(plan: _Plan, _: None, cotangent: Array) -> tuple[Array]:
    parts = cotangent.astype(plan.reduce_dtype)
    summed = jax.sharding.reshard(parts, plan.sharding)
    return (summed.astype(plan.param_dtype),)


_gather_in_half.defvjp(_forward, _backward)


def _arrays(params: PyTree) -> list[Any]:
    return [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]


def _aval(x: Array) -> Any:
    return jax.typeof(x)


def _explicit_axes(mesh: Any) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=False)
    return {name for name, kind in kinds if kind == AxisType.Explicit}
