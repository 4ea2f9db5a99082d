"""The axes of a mesh that a batch lies on: options, and what is done along them.

Each device takes one part of the batch and sums the gradients of its own examples. Then
one reduction for the whole step adds up what the devices have.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
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
        return Axes(self.names, mesh, mesh is ambient)


@dataclasses.dataclass(frozen=True)
class Axes:
    """Axes of a mesh along which a batch is divided.

    Attributes:
      names: of the axes.
      mesh: that they belong to.
      is_ambient: whether the context names this mesh.
    """

    names: tuple[str, ...]
    mesh: Mesh
    is_ambient: bool

    @property
    def size(self) -> int:
        """The number of devices along the axes."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    @property
    def along(self) -> PartitionSpec:
        """The spec of an array whose first axis is divided."""
        return PartitionSpec(self.names)

    @property
    def are_all(self) -> bool:
        """Whether the mesh is divided along no other axes."""
        return self.size == math.prod(self.mesh.shape.values())

    @property
    def are_explicit(self) -> bool:
        """Whether the types of arrays show how they lie along these axes."""
        return not self._explicit.isdisjoint(self.names)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Makes the axes automatic for a while; other explicit axes stay."""
        if not self.are_explicit:
            yield
            return
        abstract = getattr(self.mesh, "abstract_mesh", self.mesh)
        automatic = abstract.update_axis_types(
            dict.fromkeys(self.names, AxisType.Auto)
        )
        with jax.sharding.use_abstract_mesh(automatic):
            yield

    def enter(self, x: Any) -> Any:
        """An array as it has to be `inside`; anything else passes."""
        if not self.are_explicit or not isinstance(x, jax.Array):
            return x
        return jax.sharding.reshard(x, without_axes(_typed_spec(x), self.names))

    def leave(self, x: Any, spec: PartitionSpec | None) -> Any:
        """An array from `inside` as it has to be outside.

        Args:
          x: the array; anything else passes.
          spec: how it lies along these axes; None for whole.
        """
        if not self.are_explicit or not isinstance(x, jax.Array):
            return x
        inner = _typed_spec(x)
        along = tuple(spec or ()) + (None,) * x.ndim
        pairs = zip(inner, along[: x.ndim], strict=True)
        # An axis that the type shows inside stands in the user's spec as well.
        entries = [outer if outer is not None else kept for kept, outer in pairs]
        return jax.sharding.reshard(x, PartitionSpec(*entries))

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
        parts = x.reshape(self.size, count, size // self.size // count, *rest)
        return self.spread(parts, whole=1).swapaxes(0, 1)

    def spread(self, x: jax.Array, whole: int = 0) -> jax.Array:
        """Keeps the first axis of an array divided over the devices.

        Args:
          x: `[devices, ...]`.
          whole: how many of its next axes are not divided; the others are free.
        """
        free = [_ANY] * (x.ndim - 1 - whole)
        return self._place(x, PartitionSpec(self.names, *[None] * whole, *free))

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
        total = jax.lax.reduce_sum(low, (0,))
        return total if spec is None else self._place(total, spec)

    def spec_of(self, x: Any) -> PartitionSpec | None:
        """How an array lies over the mesh, if its type or its sharding says so."""
        sharding = sharding_of(x)
        if sharding is None or sharding.mesh.axis_names != self.mesh.axis_names:
            return None
        if isinstance(x, jax.core.Tracer) and not self.are_explicit:
            return None
        return sharding.spec

    @property
    def _explicit(self) -> set[str]:
        return axes_of_type(self.mesh, AxisType.Explicit)

    def _place(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        if self._explicit:
            shown = self._explicit - set(self.names)
            full = (*spec, *[None] * (x.ndim - len(spec)))
            entries = [_ANY if names_axes((e,), shown) else e for e in full]
            spec = PartitionSpec(*entries)
        by_context = self.is_ambient or self.are_explicit
        sharding = spec if by_context else NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(x, sharding)


def _typed_spec(x: jax.Array) -> PartitionSpec:
    """The spec that the type of an array shows, with an entry for each of its axes."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))


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
