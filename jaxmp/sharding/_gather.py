"""`gather_weights`: sharded float32 weights, cast to half and then gathered.

FSDP by hand. Half the bytes travel, and each device keeps its float32 shard:

    def step(shards, batch):                                  # in jax.shard_map
        def loss_fn(shards):
            return model(gather_weights(shards, "data", specs=specs), batch)
        loss, grads = jaxmp.value_and_grad(loss_fn)(shards, loss_scale=state)

The gradients of this are the shards' own, already summed over the devices: do not give
them to `reduce_gradients`, which would average the shards of different devices.

Sharp edges
- A step on automatic meshes (`jit`, axes of type `Auto`) needs none of this: cast the
  weights with `policy.cast_to_compute`, and XLA gathers what is cast.
- A whole model gathered at once is a whole model in memory. Gather each layer where it
  runs, inside its `jax.checkpoint`, and the backward pass gathers it again.
- Derivatives are backward only: `jax.grad` and `jax.vjp`, not `jax.jvp`.
"""

from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxmp._jaxpr.axes import AxisName, axis_names, bound_size
from jaxmp._tree import PyTree
from jaxmp.errors import ShardingOptionError
from jaxmp.policy import PolicyLike, get_policy
from jaxmp.sharding import _explicit, _manual
from jaxmp.sharding._reduce_dtype import FLOAT16, read_unscaled_dtype
from jaxmp.sharding._specs import broadcast_prefix

T = TypeVar("T")


def gather_weights(
    params: T,
    axis_name: AxisName,
    *,
    specs: PyTree = None,
    policy: PolicyLike = "mixed_bfloat16",
    reduce_dtype: DTypeLike | None = "float32",
    mean: bool = False,
) -> T:
    """Casts sharded weights to half, then gathers them; gradients are reduced back.

    In `jax.shard_map` the gradient is a `psum_scatter` along the gathered dimension. On
    a mesh with explicit axes it is a `reshard`, and JAX knows the specs.

    Args:
      params: pytree of weights. In `shard_map`, the device's own shards. float16,
        bfloat16 and float32 leaves are cast, all leaves are gathered.
      axis_name: mesh axis, or axes, to gather over. Weights stay sharded over others.
      specs: in `shard_map`, the `PartitionSpec` of every weight, as in `in_specs`: a
        pytree like `params` or a prefix of it. On explicit meshes it is not read.
      policy: what `get_policy` takes, a bare dtype such as `"float16"` included. The
        weights are cast to its compute dtype. Its own `reduce=` is not read.
      reduce_dtype: dtype in which gradients are summed over devices; None for the
        compute dtype. On explicit meshes a float32 sum has a limit: JAX then lets
        sharded weights of two axes or more into matmuls and into
        `x.at[ids].get(out_sharding=...)` only, and refuses `jnp.take` and elementwise
        arithmetic. Gather such weights with None. Weights of one axis, and weights that
        are not sharded over `axis_name`, are always summed in the compute dtype there.
      mean: True, in `shard_map`, divides by the number of devices before the sum: for a
        loss that is the mean over the device's own part of the batch.

    Returns:
      The weights in half, whole along `axis_name`. A gradient through it is summed over
      the axes, whether a weight was sharded over them or every device had it, and has
      the dtype and sharding of the weight.

    Raises:
      UnknownAxis: if the axis is neither bound nor an explicit axis of the mesh.
      ShardingOptionError: without `specs` in `shard_map`; for `mean` on an explicit
        mesh, where the loss is one already.
      PartitionMismatch: if `specs` and `params` do not fit each other.
      ReduceDtypeError: for a `reduce_dtype` that is not floating, and for float16
        unless the policy computes in it, and so has a loss scale.
      PolicyError: for a policy that cannot be read.

    References:
      `MixedPrecisionPolicy(param_dtype, reduce_dtype)` of PyTorch FSDP2
      (torch/distributed/fsdp/_fully_shard/_fsdp_api.py).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> from jaxmp.sharding import gather_weights
      >>> count = jax.device_count()
      >>> mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
      >>> def loss_fn(shard, x):
      ...     w = gather_weights(shard, "data", specs=P("data"), mean=True)
      ...     return jnp.mean((x.astype(w.dtype) @ w).astype(jnp.float32))
      >>> step = jax.shard_map(
      ...     jax.grad(loss_fn),
      ...     mesh=mesh,
      ...     in_specs=(P("data"), P("data")),
      ...     out_specs=P("data"),
      ... )
      >>> grads = jax.jit(step)(jnp.ones((8, 2)), jnp.ones((8, 8)))
      >>> grads.dtype.name, grads.shape, float(grads[0, 0])
      ('float32', (8, 2), 0.5)
    """
    policy = get_policy(policy)
    half = policy.compute_dtype
    if reduce_dtype is not None:
        reduce_dtype = read_unscaled_dtype(
            reduce_dtype,
            scaled=half == FLOAT16,
            repair=f"The policy {str(policy)!r} has none. Use reduce_dtype='bfloat16'.",
        )
    names = axis_names(axis_name)
    if _explicit.has_axes(params, names):
        if mean:
            raise ShardingOptionError(
                "mean=True divides the gradients of each device's own loss, and on an "
                "explicit mesh there is one loss for all. Leave it out."
            )
        return _explicit.gather(params, names, half, reduce_dtype)
    size = bound_size(axis_name, "gather_weights(params, axis_name)", _BIND)
    divisor = size if mean else 1
    settings = _manual.Settings(names, half, reduce_dtype or half, divisor)
    return jax.tree_util.tree_map_with_path(
        lambda path, x, spec: _manual.gather(path, x, spec, settings),
        params,
        _specs(specs, params),
    )


_BIND = (
    "Call it in jax.shard_map over a mesh with this axis, or on a mesh with explicit "
    "axes: jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,)). On a mesh "
    "with automatic axes, policy.cast_to_compute(params) is enough: XLA gathers what "
    "is cast."
)


def _specs(specs: PyTree, params: PyTree) -> PyTree:
    if specs is None:
        raise ShardingOptionError(
            "In shard_map an array does not show how it is sharded. Pass the specs "
            "that the weights came in with: gather_weights(params, 'data', "
            "specs=P('data'))."
        )

    specs = jax.tree.map(_spec, specs, is_leaf=lambda x: x is None)
    return broadcast_prefix(
        specs, params, "specs=", "Pass the in_specs of the weights."
    )


def _spec(spec: Any) -> PartitionSpec:
    if isinstance(spec, NamedSharding):
        return spec.spec
    return PartitionSpec() if spec is None else spec
