"""The axes of a mesh that a batch lies on: options, and what is done along them.

Each device takes one part of the batch and sums the gradients of its own examples. Then
one reduction for the whole step adds up what the devices have.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmp._jaxpr.meshes import (
    Mesh,
    ambient_mesh,
    axes_of_type,
    mesh_of,
    names_axes,
    sharding_of,
    without_axes,
)
from jaxmp.errors import DataAxesError, DataAxesOptionError

MICRO_BATCH, WINDOW = "micro_batch", "window"
_ANY = PartitionSpec.UNCONSTRAINED


@dataclasses.dataclass(frozen=True)
class DataAxes:
    """How a batch is divided over devices, as the user says.

    Attributes:
      names: axes of the mesh.
      reduce_dtype: dtype in which gradients are summed over devices.
      gather: when sharded weights are gathered: `MICRO_BATCH` or `WINDOW`.
      grad_shardings: where each gradient shall lie; None for where its parameter does.
      mesh: the mesh; None finds it.
    """

    names: tuple[str, ...]
    reduce_dtype: Any
    gather: str
    grad_shardings: Any
    mesh: Mesh | None

    def on(self, leaves: Sequence[Any]) -> "Axes":
        """Looks the axes up in the mesh.

        Args:
          leaves: of the arguments; the first that lies on a mesh shows it, if neither
            the user nor the context names one.

        Raises:
          DataAxesError: if there is no mesh or no such axis, or if the code already
            runs once on each device along it.
        """
        ambient = ambient_mesh()
        found = (mesh for x in leaves if (mesh := mesh_of(x)) is not None)
        mesh = self.mesh or ambient or next(found, None)
        asked = f"data_axes={self.names if len(self.names) > 1 else self.names[0]!r}"
        if mesh is None:
            raise DataAxesError(
                f"{asked} names axes of a mesh, and no mesh is in sight: inside jit, "
                "arrays do not show theirs. Call the step under `with "
                "jax.set_mesh(mesh):`, or pass mesh=mesh to jaxmp.value_and_grad."
            )
        missing = [name for name in self.names if name not in mesh.axis_names]
        if missing:
            raise DataAxesError(
                f"{asked} names {missing[0]!r}, and the mesh has the axes "
                f"{list(mesh.axis_names)}. Name those that the batch is divided over."
            )
        if manual := axes_of_type(mesh, AxisType.Manual) & set(self.names):
            raise DataAxesError(
                f"{asked}: the code runs inside shard_map, once on each device along "
                f"{sorted(manual)}, and has its part of the batch already. Leave "
                "data_axes out here and average with jax.lax.pmean, or call "
                "jaxmp.value_and_grad outside of shard_map."
            )
        explicit = axes_of_type(mesh, AxisType.Explicit) & set(self.names)
        if explicit and explicit != set(self.names):
            raise DataAxesError(
                f"{asked}: {sorted(explicit)} is an explicit axis of the mesh and "
                f"{sorted(set(self.names) - explicit)} is not. Make all of them "
                "AxisType.Auto, or all of them AxisType.Explicit."
            )
        return Axes(self.names, mesh, mesh is ambient, bool(explicit))


@dataclasses.dataclass(frozen=True)
class Axes:
    """Axes of a mesh along which a batch is divided.

    Attributes:
      names: of the axes.
      mesh: that they belong to.
      is_ambient: whether the context names this mesh.
      is_explicit: whether they are `AxisType.Explicit`.
    """

    names: tuple[str, ...]
    mesh: Mesh
    is_ambient: bool
    is_explicit: bool

    @property
    def size(self) -> int:
        """The number of devices along the axes."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    @property
    def are_all(self) -> bool:
        """Whether the mesh is divided along no other axes."""
        return self.size == math.prod(self.mesh.shape.values())

    def split(self, x: jax.Array, count: int) -> jax.Array:
        """Gives every device consecutive examples, and cuts those into micro-batches.

        No example leaves its device if the batch is sharded along these axes.

        Args:
          x: `[examples, ...]`.
          count: number of micro-batches.

        Returns:
          `[count, devices, examples of a part, ...]`.
        """
        size, *rest = x.shape
        shape = (self.size, count, size // self.size // count, *rest)
        if self.is_explicit:
            others = without_axes(_spec(x), self.names)[1:]
            x = self._place(x, PartitionSpec(self.names, *others))
            spec = PartitionSpec(self.names, None, None, *others)
            x = jax.lax.reshape(x, shape, out_sharding=self._sharding(spec))
        else:
            x = self.spread(x.reshape(shape), whole=1)
        return x.swapaxes(0, 1)

    def spread(self, x: jax.Array, whole: int = 0) -> jax.Array:
        """Keeps the first axis of an array divided over the devices.

        Args:
          x: `[devices, ...]`.
          whole: how many of its next axes are not divided; the others are free.
        """
        if self.is_explicit:
            return x
        free = [_ANY] * (x.ndim - 1 - whole)
        return self._place(x, PartitionSpec(self.names, *[None] * whole, *free))

    def zeros(self, like: Any, dtype: Any) -> jax.Array:
        """Zeros of another dtype that lie as an abstract array `[devices, ...]` does."""
        if self.is_explicit:
            return jnp.zeros(like.shape, dtype, device=like.sharding)
        return self.spread(jnp.zeros(like.shape, dtype))

    def gathered(self, x: jax.Array, spec: PartitionSpec | None, dtype: Any) -> Any:
        """A weight as every device needs it: whole along these axes.

        Args:
          x: the weight.
          spec: how it lies; None if nobody knows.
          dtype: the dtype that the loss function reads it in, in which it travels;
            None for its own.
        """
        if spec is None and not self.are_all:
            raise DataAxesError(
                f"gather='window' cannot see how a weight of shape {list(x.shape)} "
                f"lies over the mesh, which has more axes than {list(self.names)}. "
                "Pass grad_shardings=, the shardings of the parameters."
            )
        if dtype is not None and jnp.dtype(dtype).itemsize < x.dtype.itemsize:
            x = x.astype(dtype)
        if spec is not None and not names_axes(spec, self.names):
            return x
        spec = PartitionSpec() if spec is None else without_axes(spec, self.names)
        return self._place(x, spec)

    def reduced(self, x: jax.Array, dtype: Any, spec: PartitionSpec | None) -> Any:
        """The sum over devices, made and sent in one dtype.

        Args:
          x: `[devices, ...]`.
          dtype: in which it travels.
          spec: how the result shall lie; None leaves it to the compiler.

        Returns:
          An array of `dtype` and of shape `[...]`.
        """
        low = self.spread(x.astype(dtype))
        total = jax.lax.reduce(low, jnp.zeros((), low.dtype), jax.lax.add, (0,))
        return total if spec is None else self._place(total, spec)

    def spec_of(self, x: Any) -> PartitionSpec | None:
        """How an array lies over the mesh, if its type or its sharding says so."""
        sharding = sharding_of(x)
        if sharding is None or sharding.mesh.axis_names != self.mesh.axis_names:
            return None
        return sharding.spec

    def _place(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        if self.is_explicit:
            return jax.sharding.reshard(x, self._sharding(spec))
        return jax.lax.with_sharding_constraint(x, self._sharding(spec))

    def _sharding(self, spec: PartitionSpec) -> Any:
        return spec if self.is_ambient else NamedSharding(self.mesh, spec)


def read_data_axes(
    data_axes: str | Sequence[str] | None, options: Mapping[str, Any]
) -> DataAxes | None:
    """Reads `data_axes` and the options that belong to it.

    Args:
      data_axes: an axis or several; None for none.
      options: `reduce_dtype`, `gather`, `grad_shardings` and `mesh`, None where the
        user says nothing.

    Raises:
      DataAxesOptionError: for an option that has no meaning.
    """
    if data_axes is None:
        for name, value in options.items():
            if value is not None:
                raise DataAxesOptionError(
                    f"{name}={value!r} is about the devices of data_axes, and there "
                    "is no data_axes. Name the axes of the mesh that the batch is "
                    f"divided over: data_axes='data', {name}=..."
                )
        return None
    names = (data_axes,) if isinstance(data_axes, str) else tuple(data_axes)
    if not names or not all(isinstance(name, str) for name in names):
        raise DataAxesOptionError(
            f"data_axes={data_axes!r} names no axis of a mesh. Write data_axes='data', "
            "or a tuple of names."
        )
    gather = MICRO_BATCH if options["gather"] is None else options["gather"]
    if gather not in (MICRO_BATCH, WINDOW):
        raise DataAxesOptionError(
            f"gather={gather!r} is neither {MICRO_BATCH!r}, which gathers sharded "
            f"weights for each micro-batch, nor {WINDOW!r}, which gathers them once "
            "and keeps them."
        )
    dtype = _read_dtype(options["reduce_dtype"])
    return DataAxes(names, dtype, gather, options["grad_shardings"], options["mesh"])


def _read_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        read = jnp.dtype(dtype)
    except TypeError:
        read = None
    if read is None or not jnp.issubdtype(read, jnp.floating) or read.itemsize < 2:
        raise DataAxesOptionError(
            f"reduce_dtype={dtype!r} is not a dtype that gradients can be summed in. "
            "Use 'float32', 'bfloat16' or 'float16'."
        )
    return read


def _spec(x: jax.Array) -> PartitionSpec:
    """The spec of an array, with one entry for each of its axes."""
    sharding = sharding_of(x)
    known = () if sharding is None or sharding.mesh.empty else tuple(sharding.spec)
    return PartitionSpec(*known, *[None] * (x.ndim - len(known)))
