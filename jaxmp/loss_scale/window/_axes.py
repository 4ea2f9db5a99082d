"""Axes of a mesh along which a batch is divided, and what is done along them.

The batch is placed, weights are gathered and gradients are summed by constraints on
shardings, for the compiler to carry out. Explicit axes are made automatic meanwhile.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as Concrete

from jaxmp._jaxpr.meshes import (
    Mesh,
    axes_of_type,
    names_axes,
    sharding_of,
    without_axes,
)
from jaxmp.errors import DataAxesError

_ANY = PartitionSpec.UNCONSTRAINED


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
        mesh = self.mesh
        abstract = mesh.abstract_mesh if isinstance(mesh, Concrete) else mesh
        automatic = abstract.update_axis_types(dict.fromkeys(self.names, AxisType.Auto))
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

    def zeros(self, like: Any, dtype: Any) -> jax.Array:
        """Zeros, `[devices, ...]`, that lie as an array of some type does."""
        if self._explicit - set(self.names):
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
        total = jax.lax.reduce_sum(self.spread(x.astype(dtype)), (0,))
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
