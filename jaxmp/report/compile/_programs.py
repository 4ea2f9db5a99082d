"""A step as the compiler of another machine takes it: traced here, compiled there."""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import export

from jaxmp import _tree
from jaxmp._jaxpr.argument_names import argument_names
from jaxmp._jaxpr.lowered import kept_arguments
from jaxmp._jaxpr.lowering import lowering_for
from jaxmp.casting import autocast
from jaxmp.errors import NotAnArray, ShardingMismatch, StepDoesNotTrace
from jaxmp.policy import PolicyLike, get_policy
from jaxmp.report.compile._mlir_bytes import write_module
from jaxmp.report.compile.targets import Target, read_target


class Program(NamedTuple):
    """A step that is ready to be compiled.

    Attributes:
      target: what for.
      written: its operations, with their source lines.
      is_exported: whether `jax.export` wrote them, as it does for several devices.
      arguments: names of its arguments, such as `"params/dense/kernel"`; those that it
        does not use are left out, as by `jax.jit`.
      donated: whether each of them is donated.
      mesh: names, sizes and types of the axes that it is sharded over.
      options: of the compiler, by name.
    """

    target: Target
    written: bytes
    is_exported: bool
    arguments: tuple[str, ...]
    donated: tuple[bool, ...]
    mesh: tuple[tuple[str, int, str], ...]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """A digest of everything that a compiler sees."""
        seen = (str(self.target), self.donated, self.mesh, self.options)
        return hashlib.sha256(self.written + repr(seen).encode()).hexdigest()


def under_policy(step: Callable[..., Any], policy: PolicyLike) -> Callable[..., Any]:
    """A step under a policy.

    Args:
      step: given the policy if it has an argument named `policy`. Any other step runs
        under `autocast`, or as it is if the policy computes in float32.
      policy: anything `jaxmp.get_policy` takes.
    """
    if _takes_policy(step):
        return functools.partial(step, policy=policy)
    if get_policy(policy).compute_dtype == get_policy("float32").compute_dtype:
        return step
    return autocast(step, policy)


def _takes_policy(step: Callable[..., Any]) -> bool:
    try:
        return "policy" in inspect.signature(step).parameters
    except (TypeError, ValueError):
        return False


def donated_arguments(step: Callable[..., Any], args: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the arguments that a jitted step donates as a whole."""
    if not hasattr(step, "trace"):
        return ()
    infos = [jax.tree.leaves(info) for info in trace(step, args).args_info[0]]
    return tuple(
        i for i, info in enumerate(infos) if info and all(x.donated for x in info)
    )


def trace(jitted: Any, args: Sequence[Any]) -> Any:
    """Traces a jitted step.

    Raises:
      NotAnArray: for an argument that is not an array.
      StepDoesNotTrace: for whatever the step raises while it is traced.
    """
    try:
        return jitted.trace(*args)
    except Exception as error:
        check_arrays(args)
        raise StepDoesNotTrace(
            f"The step cannot be traced with {_summary(args)}. It raised "
            f"{type(error).__name__}: {error}"
        ) from error


def check_arrays(args: Sequence[Any]) -> None:
    """Raises `NotAnArray` for the first leaf that is neither an array nor a number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, _tree.SCALARS):
            raise NotAnArray(
                f"Argument {_tree.path_string(path)} of the step is {leaf!r}, which is "
                "not an array. Pass arrays or jax.ShapeDtypeStructs, and bind "
                "everything else first: functools.partial(step, config=...)."
            )


def export_program(
    step: Callable[..., Any],
    args: Sequence[Any],
    target: Target,
    donate_argnums: Sequence[int] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> Program:
    """Traces a step and lowers it for a target.

    Args:
      step: a function of pytrees of arrays, jitted or not.
      args: arrays or `jax.ShapeDtypeStruct`s. Their `NamedSharding`s, over devices or
        over a `jax.sharding.AbstractMesh`, say how the program is divided.
      target: what it will be compiled for.
      donate_argnums: as for `jax.jit`; unused for a step that is jitted already.
      compiler_options: of XLA, by name.
    """
    jitted: Any = step
    if not hasattr(step, "trace"):
        check_arrays(args)
        jitted = jax.jit(step, donate_argnums=tuple(donate_argnums))
    traced = trace(jitted, args)
    infos = jax.tree_util.tree_leaves_with_path(traced.args_info[0])
    mesh = _mesh_of(args)
    try:
        platforms = (target.platform,)
        with lowering_for(target.device_kind):
            lowered = None if mesh else traced.lower(lowering_platforms=platforms)
            module = None if lowered is None else write_module(lowered)
            written, devices = (module, 1) if module else _export(jitted, args, target)
    except Exception as error:
        raise StepDoesNotTrace(
            f"The step cannot be lowered for {str(target)!r}. It raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if module is not None:
        infos = [infos[i] for i in kept_arguments(lowered)]
    names = argument_names(step, len(args))
    return Program(
        target=_with_devices(target, devices),
        written=written,
        is_exported=module is None,
        arguments=tuple(_argument_path(names, path) for path, _ in infos),
        donated=tuple(info.donated for _, info in infos),
        mesh=mesh,
        options=tuple(sorted((compiler_options or {}).items())),
    )


def _export(jitted: Any, args: Sequence[Any], target: Target) -> tuple[bytes, int]:
    """What `jax.export` writes, and for how many devices."""
    exported = export.export(jitted, platforms=(target.platform,))(*args)
    # A flat list of arrays: trees of a user's own classes cannot be written down.
    exported = dataclasses.replace(
        exported,
        in_tree=jax.tree.structure(((0,) * len(exported.in_avals), {})),
        out_tree=jax.tree.structure((0,) * len(exported.out_avals)),
    )
    return bytes(exported.serialize()), exported.nr_devices


def _with_devices(target: Target, written_for: int) -> Target:
    """The target with as many devices as the step is written for."""
    if target.devices not in (None, written_for):
        raise ShardingMismatch(
            f"The target {str(target)!r} has {target.devices} devices, and the step is "
            f"written for {written_for}. Divide its arguments: give each "
            "jax.ShapeDtypeStruct a sharding=NamedSharding(AbstractMesh("
            f"({target.devices},), ('data',)), PartitionSpec('data'))."
        )
    return read_target(
        f"{target.name}:{written_for}" if written_for > 1 else target.name
    )


def _mesh_of(args: Sequence[Any]) -> tuple[tuple[str, int, str], ...]:
    """The first mesh of several devices among the shardings of the arguments."""
    for leaf in jax.tree.leaves(args):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if mesh is not None and mesh.size > 1:
            types = (axis_type.name for axis_type in mesh.axis_types)
            return tuple(zip(mesh.axis_names, mesh.axis_sizes, types, strict=True))
    return ()


def _argument_path(names: Sequence[str], path: tuple[Any, ...]) -> str:
    inner = _tree.path_string(path[1:])
    return f"{names[path[0].idx]}/{inner}".rstrip("/")


def _summary(args: Sequence[Any]) -> str:
    leaves = [x for x in jax.tree.leaves(args) if hasattr(x, "dtype")]
    shown = ", ".join(f"{x.dtype}{list(x.shape)}" for x in leaves[:4])
    return f"{len(leaves)} arrays ({shown}{', ...' if len(leaves) > 4 else ''})"
