"""Meshes of devices: which one a program runs on, and specs that name its axes."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmp._jaxpr.rewrite import map_equations, map_held
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def ambient_mesh() -> Mesh | None:
    """The mesh of `jax.set_mesh` or of `with mesh:`, None outside of both."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh
    from jax._src import mesh as internals

    entered = internals.thread_resources.env.physical_mesh
    return None if entered.empty else entered


def mesh_of(x: Any) -> Mesh | None:
    """The mesh that an array lies on, if its type or its sharding says so."""
    mesh = getattr(sharding_of(x), "mesh", None)
    return None if mesh is None or mesh.empty else mesh


def sharding_of(x: Any) -> NamedSharding | None:
    """The sharding of an array over a mesh; of a tracer, what its type shows.

    The type of a tracer shows explicit axes alone.
    """
    if not isinstance(x, jax.Array):
        return None
    is_traced = isinstance(x, jax.core.Tracer)
    sharding = jax.typeof(x).sharding if is_traced else x.sharding
    return sharding if isinstance(sharding, NamedSharding) else None


def explicit_sharding(aval: Any) -> NamedSharding | None:
    """How the type of a value divides it along explicit axes; None if it does not."""
    sharding = getattr(aval, "sharding", None)
    spec = getattr(sharding, "spec", ())
    return sharding if any(names is not None for names in spec) else None


def axes_of_type(mesh: Mesh, kind: AxisType) -> set[str]:
    """The names of the automatic, explicit or manual axes of a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, of_axis in kinds if of_axis == kind}


def without_axes(spec: PartitionSpec, axes: Iterable[str]) -> PartitionSpec:
    """The spec of an array that is whole along some axes of the mesh."""
    gone = set(axes)

    def kept(names: Any) -> Any:
        if isinstance(names, tuple):
            left = tuple(name for name in names if name not in gone)
            return left if len(left) > 1 else (left[0] if left else None)
        return None if names in gone else names

    return PartitionSpec(*map(kept, spec))


def names_axes(spec: Iterable[Any], axes: Iterable[str]) -> bool:
    """Whether a spec divides an array along one of some axes of the mesh."""
    named = {n for e in spec for n in (e if isinstance(e, tuple) else (e,))}
    return not named.isdisjoint(axes)


def with_batched_constraints(jaxpr: Jaxpr, axes: tuple[str, ...]) -> Any:
    """The same jaxpr, to be mapped over a batch axis that is divided over `axes`.

    JAX refuses to map a `with_sharding_constraint` that names one of these axes. Here
    it leaves them to the batch axis and keeps the rest of its spec. A value that does
    not depend on the batch, such as a weight, keeps its constraint as it is.
    """

    def in_jaxpr(jaxpr: Jaxpr) -> Any:
        return map_equations(jaxpr, in_equation)

    def in_equation(eqn: Eqn) -> Any:
        sharding = eqn.params.get("sharding")
        if eqn.primitive.name == "sharding_constraint":
            is_named = isinstance(sharding, NamedSharding)
            if is_named and names_axes(sharding.spec, axes):
                return _replaced(eqn, _batched_constraint(sharding, axes))
            return eqn
        params = map_held(eqn.params, in_jaxpr)
        return eqn if params is eqn.params else eqn.replace(params=params)

    return in_jaxpr(jaxpr)


def _batched_constraint(
    sharding: NamedSharding, axes: tuple[str, ...]
) -> Callable[[Any], Any]:
    @jax.custom_batching.custom_vmap
    def constrained(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, sharding)

    @constrained.def_vmap
    def batched(size: int, is_batched: list[bool], x: Any) -> tuple[Any, bool]:
        del size, is_batched
        spec = PartitionSpec(axes, *without_axes(sharding.spec, axes))
        return jax.lax.with_sharding_constraint(x, sharding.update(spec=spec)), True

    return constrained


def _replaced(eqn: Eqn, fun: Callable[[Any], Any]) -> Any:
    """The equation of `fun`, on the operand of another equation and for its result."""
    aval = eqn.invars[0].aval
    traced = jax.make_jaxpr(fun)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    (new,) = open_jaxpr(traced).eqns
    return new.replace(invars=list(eqn.invars), outvars=list(eqn.outvars))
