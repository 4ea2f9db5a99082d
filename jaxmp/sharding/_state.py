"""`state_shardings`: where an optimizer's state lies, so that no device holds it twice.

ZeRO-1. Each device of the data axis keeps and updates its part of the moments and
master weights. XLA then reduces gradients to those parts, and gathers the new weights,
in half if the weights are half:

    shardings = state_shardings(
        jax.eval_shape(tx.init, params), params, param_shardings, over="data"
    )
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    step = jax.jit(step, out_shardings=(param_shardings, shardings))

Sharp edges
- Give the step these as `out_shardings`, or XLA chooses.
- What belongs to a weight is known by its path and shape: optimizers that keep a
  weight's state under other names or in factors (the rows and columns of Adafactor,
  the matrices of Shampoo) have that part on every device.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from jaxmp import _tree
from jaxmp._jaxpr.axes import AxisName, axis_names, dimension_axes
from jaxmp._tree import PyTree
from jaxmp.errors import PartitionMismatch, UnknownAxis
from jaxmp.sharding._specs import broadcast_prefix, spec_of

T = TypeVar("T")

Shape = tuple[int, ...]
Path = tuple[Any, ...]


def state_shardings(
    state: T, params: PyTree, param_shardings: PyTree, *, over: AxisName = "data"
) -> T:
    """Divides an optimizer state over an axis on which the weights may be whole.

    What has the path and the shape of a weight (moments, master weights, sums of
    gradients, averages) gets the sharding of the weight, divided further: along its
    first dimension that is free and that the axis divides, else along the first that
    other axes have divided already, if `over` divides what is left. If there is none,
    or the weight is sharded over the axis, the sharding of the weight stays. Everything
    else, such as counts and the loss scale, is on every device.

    Args:
      state: an optimizer state of Optax or jaxmp, however wrapped, or a `TrainState`,
        whose parameters keep their shardings. Arrays, or `jax.eval_shape` of them.
      params: the pytree of weights that it was made for; shapes suffice.
      param_shardings: a `NamedSharding` for each weight, or a prefix of that tree.
      over: the mesh axis to divide over, or a tuple of axes; `"data"` for ZeRO-1.

    Returns:
      The tree of the state with a `NamedSharding` for each array: for `out_shardings`,
      `in_shardings` and `jax.device_put`.

    Raises:
      UnknownAxis: if a mesh has no axis `over`.
      PartitionMismatch: if `param_shardings` does not fit the weights.

    References:
      Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
      Parameter Models", 2020, section 5.1 (https://arxiv.org/abs/1910.02054).

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from jaxmp.sharding import state_shardings
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params = {"w": jnp.ones((8 * jax.device_count(), 3), jnp.bfloat16)}
      >>> tx = jaxmp.loss_scaling(jaxmp.master_weights(optax.adam(0.1)), "bfloat16")
      >>> shapes = jax.eval_shape(tx.init, params)
      >>> found = state_shardings(shapes, params, NamedSharding(mesh, P()))
      >>> tuple(found.inner_state.master["w"].spec), tuple(found.loss_scale.spec)
      (('data',), ())
    """
    names = axis_names(over)
    weights = {
        path: _Weight(np.shape(x), sharding)
        for path, x, sharding in _with_shardings(params, param_shardings)
    }
    for path, weight in weights.items():
        _check_fits(path, weight, names)
    mesh = next((weight.sharding.mesh for weight in weights.values()), None)

    def sharding_of(path: Path, x: Any) -> NamedSharding | None:
        shape = np.shape(x)
        if len(path) and path[0] == GetAttrKey("params") and path[1:] in weights:
            return weights[path[1:]].sharding
        for suffix in _suffixes(path):
            if suffix in weights and weights[suffix].has(shape):
                return _divided(shape, weights[suffix], names)
        return None if mesh is None else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding_of, state)


class _Weight(NamedTuple):
    shape: Shape
    sharding: NamedSharding

    def has(self, shape: Shape) -> bool:
        """Whether an array has this shape, or is a stack of such, as in L-BFGS."""
        ndim = len(self.shape)
        return ndim > 0 and shape[len(shape) - ndim :] == self.shape


def _divided(shape: Shape, weight: _Weight, names: tuple[str, ...]) -> NamedSharding:
    """Divides the sharding of a weight further, for an array with its shape."""
    sharding, stacked = weight.sharding, len(shape) - len(weight.shape)
    sizes = sharding.mesh.shape
    axes = [()] * stacked + dimension_axes(sharding.spec, len(weight.shape))
    new = tuple(n for n in names if all(n not in taken for taken in axes))
    if new:
        places = range(stacked, len(shape))
        free_first = sorted(places, key=lambda i: bool(axes[i]))
        for i in free_first:
            if shape[i] % math.prod(sizes[n] for n in (*axes[i], *new)) == 0:
                axes[i] = (*axes[i], *new)
                break
    spec = spec_of(axes)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _suffixes(path: Path) -> Iterator[Path]:
    """The ends of a path, the longest first."""
    return (path[i:] for i in range(len(path) + 1))


def _with_shardings(
    params: PyTree, param_shardings: PyTree
) -> list[tuple[Path, Any, NamedSharding]]:
    shardings = broadcast_prefix(
        param_shardings,
        params,
        "param_shardings",
        "Pass one NamedSharding for each of them, or one for all.",
    )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = jax.tree.leaves(shardings)
    return [(path, x, s) for (path, x), s in zip(leaves, found, strict=True)]


def _check_fits(path: Path, weight: _Weight, names: tuple[str, ...]) -> None:
    name, sharding = _tree.path_string(path), weight.sharding
    if not isinstance(sharding, NamedSharding):
        raise PartitionMismatch(
            f"The weight {name!r} has the sharding {sharding!r}, which names no mesh. "
            "Pass jax.sharding.NamedSharding(mesh, spec)."
        )
    if len(sharding.spec) > len(weight.shape):
        raise PartitionMismatch(
            f"The weight {name!r} has the shape {weight.shape} and the spec "
            f"{sharding.spec}, which has {len(sharding.spec)} entries. Pass one entry "
            "for each dimension at most."
        )
    for axis in names:
        if axis not in sharding.mesh.shape:
            raise UnknownAxis(
                f"over={axis!r} is not an axis of the mesh, which has: "
                f"{', '.join(map(repr, sharding.mesh.axis_names))}. Name one of these."
            )
