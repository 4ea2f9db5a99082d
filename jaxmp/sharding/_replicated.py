"""`replicated`: weights that every device has, whose gradients no half sum meets.

Under `jax.shard_map`, JAX sums the gradient of a weight that all devices share where
the weight first meets the device's part of the batch. That is behind the cast to half:

    w.astype(float16)  ->  [JAX: let it vary; backward: sum over devices]  ->  matmul

So the devices' float16 gradients are summed in float16, and eight of them leave the
loss scale three powers of two less. `replicated` lets the weight vary before any cast.
"""

from typing import Any, TypeVar

import jax

from jaxmp import _tree
from jaxmp._jaxpr.axes import AxisName, axis_names, bound_size, to_varying

T = TypeVar("T")


def replicated(params: T, axis_name: AxisName) -> T:
    """Marks weights that every device has, so that gradients are summed in float32.

    Use it in `jax.shard_map`, on weights that come in with the spec `P()`:

    - inside the loss, JAX sums their gradients over the devices, in float32;
    - outside of it, JAX sums nothing, and `reduce_gradients` does.

    Where JAX sums nothing by itself (`pmap`, `check_vma=False`), this changes nothing,
    and `reduce_gradients` is needed in any case.

    Args:
      params: pytree of weights, each the same on every device. The gradients of float16
        and bfloat16 weights are summed in float32 too, and rounded once. Leaves that
        are not floating pass unchanged.
      axis_name: the mesh axis, or axes, over which the batch is divided.

    Returns:
      The same weights, in their dtypes. JAX takes them for different on each device.

    Raises:
      UnknownAxis: if no `shard_map` or `pmap` binds the axis here.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> from jaxmp.sharding import reduce_gradients, replicated
      >>> count = jax.device_count()
      >>> mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
      >>> def gradient(w, x):
      ...     loss = lambda w: jnp.mean(x.astype(jnp.float16) * w.astype(jnp.float16))
      ...     return reduce_gradients(jax.grad(loss)(replicated(w, "data")), "data")
      >>> step = jax.shard_map(
      ...     gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
      ... )
      >>> float(jax.jit(step)(jnp.float32(1), jnp.ones(count)))
      1.0
    """
    bound_size(axis_name, "replicated(params, axis_name)")
    names = axis_names(axis_name)

    def mark(x: Any) -> Any:
        if not _tree.is_inexact(x):
            return x
        return _tree.like(to_varying(_tree.at_least_float32(x), names), x)

    return jax.tree.map(mark, params)
