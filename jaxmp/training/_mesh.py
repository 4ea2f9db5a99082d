"""Whether the arrays of a checkpoint can be divided over the mesh they come back on."""

import math
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from jaxmp._jaxpr.axes import dimension_axes
from jaxmp.errors import CheckpointMeshMismatch


def check_mesh(named: dict[str, Any], where: str) -> None:
    """Raises for the first array that its sharding does not divide.

    Args:
      named: arrays or `jax.ShapeDtypeStruct`, by their paths in the state.
      where: names the checkpoint.

    Raises:
      CheckpointMeshMismatch: with the path, the shape, the spec and the repair.
    """
    for name, x in named.items():
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            continue
        for dimension, axes in enumerate(dimension_axes(sharding.spec)):
            parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
            shape = np.shape(x)
            if dimension >= len(shape) or shape[dimension] % parts:
                raise CheckpointMeshMismatch(
                    f"{where} has {name!r} with the shape {list(shape)}, and it is to "
                    f"be restored with the spec {sharding.spec} on a mesh of "
                    f"{dict(sharding.mesh.shape)}: dimension {dimension} cannot be "
                    f"divided by {parts}. Leave that dimension whole in its spec, or "
                    "choose a mesh whose axes divide it; "
                    "jaxmp.sharding.state_shardings chooses dimensions that divide."
                )
