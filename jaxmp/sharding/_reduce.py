"""`reduce_gradients`: the sum or mean over devices, in a dtype that you choose."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmp import _tree
from jaxmp._jaxpr.axes import (
    AxisName,
    axis_names,
    bound_size,
    counts_varying,
    varying_axes,
)
from jaxmp.errors import GradientsAlreadySummed
from jaxmp.loss_scale import get_loss_scale
from jaxmp.sharding._reduce_dtype import FLOAT16, read_unscaled_dtype

T = TypeVar("T")


def reduce_gradients(
    grads: T,
    axis_name: AxisName,
    *,
    dtype: DTypeLike = "float32",
    mean: bool = True,
    loss_scale: Any = None,
) -> T:
    """Averages or sums the gradients of all devices, in `shard_map` and `pmap`.

    Each gradient is divided by the number of devices in float32, rounded to `dtype` and
    then summed, so that no sum overflows where its mean does not. The optimizer and
    its decision to skip come after this.

    Args:
      grads: pytree of the device's own gradients, as `jaxmp.value_and_grad` returns
        them: true ones. float16, bfloat16 and float32 leaves are reduced in `dtype`,
        float64 and complex ones in their own. Integers, booleans, keys, float0 and
        None pass as they are.
      axis_name: the mesh axis over which the batch is divided, or a tuple of axes.
      dtype: what travels between devices and is summed. bfloat16 halves the traffic of
        float32; its rounding grows with the number of devices.
      mean: False for the sum, if the loss is a sum over the batch.
      loss_scale: needed for float16, in which true gradients become zero: whatever
        `get_loss_scale` takes, or a number. Gradients then travel multiplied by it.

    Returns:
      The same tree, equal on every device; float16 and bfloat16 leaves are float32.

    Raises:
      UnknownAxis: if no `shard_map` or `pmap` binds the axis here.
      ReduceDtypeError: for a dtype that is not floating, and for float16 without
        `loss_scale`.
      GradientsAlreadySummed: if JAX has summed a gradient over the axis by itself, as
        it does in `shard_map` for weights with the spec `P()`. The mean over devices
        would be that sum, as many times too large as there are devices.

    References:
      `reduce_dtype` of PyTorch FSDP2's `MixedPrecisionPolicy`
      (torch/distributed/fsdp/_fully_shard/_fsdp_api.py), and
      `gradient_predivide_factor` of its reduction
      (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.sharding import reduce_gradients
      >>> grads = {"w": jnp.arange(4.0)}
      >>> fn = lambda grads: reduce_gradients(grads, "data", dtype="bfloat16")
      >>> jax.vmap(fn, axis_name="data")(grads)["w"].tolist()
      [1.5, 1.5, 1.5, 1.5]
    """
    reduce_dtype = read_unscaled_dtype(
        dtype,
        scaled=loss_scale is not None,
        repair="Pass loss_scale=opt_state, or use dtype='bfloat16'.",
    )
    size = bound_size(axis_name, "reduce_gradients(grads, axis_name)")
    names = axis_names(axis_name)
    divisor = jnp.float32(size if mean else 1)
    scale = jnp.float32(1)
    if reduce_dtype == FLOAT16:
        scale = _number(loss_scale)

    def reduce(path: Any, x: Any) -> Any:
        if not _tree.is_inexact(x):
            return x
        _refuse_summed(path, x, names)
        if not _tree.is_castable(x):
            return jax.lax.psum(x / divisor.astype(x.real.dtype), names)
        part = jnp.asarray(x, jnp.float32) * scale / divisor
        total = jax.lax.psum(part.astype(reduce_dtype), names)
        return total.astype(jnp.float32) / scale

    return jax.tree_util.tree_map_with_path(reduce, grads)


def _number(loss_scale: Any) -> jax.Array:
    is_number = _tree.is_array(loss_scale) or isinstance(loss_scale, (int, float))
    scale = loss_scale if is_number else get_loss_scale(loss_scale)
    return jnp.asarray(scale, jnp.float32)


def _refuse_summed(path: Any, x: Any, names: tuple[str, ...]) -> None:
    varying = varying_axes(x)
    for name in names:
        if name not in varying and counts_varying(name):
            raise GradientsAlreadySummed(
                f"The gradient {_tree.path_string(path)!r} is the same on every device "
                f"of the axis {name!r}: JAX has summed it, in the dtype in which the "
                "weight met the batch. Differentiate with respect to "
                f"jaxmp.sharding.replicated(params, {name!r}) and reduce after that, "
                "or take the mean of the loss over the devices and leave "
                "reduce_gradients out."
            )
