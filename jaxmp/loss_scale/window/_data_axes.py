"""The options of `value_and_grad` that divide a batch over devices.

Each device takes one part of the batch and sums the gradients of its own examples. Then
one reduction for the whole step adds up what the devices have.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AxisType

from jaxmp._jaxpr.meshes import Mesh, ambient_mesh, axes_of_type, mesh_of
from jaxmp.errors import DataAxesError, DataAxesOptionError
from jaxmp.loss_scale.window._axes import Axes
from jaxmp.policy.reduce_dtype import read_sum_dtype

MICRO_BATCH, WINDOW = "micro_batch", "window"


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

    def on(self, leaves: Sequence[Any]) -> Axes:
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
        several = len(self.names) > 1
        asked = f"data_axes={(self.names if several else next(iter(self.names)))!r}"
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
    read = read_sum_dtype(dtype)
    if read is None:
        raise DataAxesOptionError(
            f"reduce_dtype={dtype!r} is not a dtype that gradients can be summed in. "
            "Use 'float32', 'bfloat16' or 'float16'."
        )
    return read
