"""Compile targets: the TPU and H100 compilers of XLA, on a machine without either.

Both compilers come from PyPI (`pip install 'jaxmp[targets]'`) and need a process that
was started with `TARGET_ENVIRONMENT`. What they compile cannot run here; its memory,
traffic and dtypes can be read.
"""

import importlib.resources
import importlib.util
import os
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies

from jaxmp.errors import MissingTargetPackage, UnknownTarget

TARGET_ENVIRONMENT = MappingProxyType(
    {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
)
"""What the environment of a compiling process needs before it imports JAX."""

_TPU_TOPOLOGIES = MappingProxyType(
    {
        "tpu-v4": "v4:2x2x1",
        "tpu-v5e": "v5e:2x2",
        "tpu-v5p": "v5p:2x2x1",
        "tpu-v6e": "v6e:2x2",
        "tpu7x": "tpu7x:2x2x1",
    }
)
_PACKAGES = {"h100": ("jax_cuda12_plugin", "nvidia.cuda_nvcc"), "tpu": ("libtpu",)}


def targets() -> tuple[str, ...]:
    """Lists the names that `target_devices` takes.

    Returns:
      A tuple of names.

    Example:
      >>> from jaxmp.report import targets
      >>> "h100" in targets()
      True
    """
    return ("h100", *_TPU_TOPOLOGIES)


def has_target(target: str) -> bool:
    """Tells whether the packages that compile for a target are installed.

    Args:
      target: a name of `targets()`.

    Returns:
      A boolean; nothing is imported.

    Raises:
      UnknownTarget: for a name that is none.

    Example:
      >>> from jaxmp.report import has_target
      >>> isinstance(has_target("h100"), bool)
      True
    """
    return not _missing_packages(target)


def target_devices(target: str) -> list[Any]:
    """Returns the devices of a target, to compile for.

    Args:
      target: a name of `targets()`.

    Returns:
      Devices without a machine; put them into a sharding and compile for that.

    Raises:
      UnknownTarget: for a name that is none.
      MissingTargetPackage: if the packages of the `targets` extra are missing, or the
        process was started without `TARGET_ENVIRONMENT`.

    Example:
      >>> from jaxmp.report import has_target, target_devices
      >>> if has_target("h100"):
      ...     assert "H100" in target_devices("h100")[0].device_kind
    """
    missing = _missing_packages(target)
    unset = [k for k, v in TARGET_ENVIRONMENT.items() if os.environ.get(k) != v]
    if missing or unset:
        raise MissingTargetPackage(
            f"Compiling for {target!r} needs the packages {missing or 'that are there'}"
            f" and an environment that sets {dict(TARGET_ENVIRONMENT)} before JAX is "
            "imported. Run: pip install 'jaxmp[targets]'"
        )
    if target == "h100":
        description = importlib.resources.files("jaxmp.report") / "_h100.txtpb"
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=description.read_text(),
            topology="1x1x1",
        ).devices
    return topologies.get_topology_desc(
        platform="tpu", topology_name=_TPU_TOPOLOGIES[target]
    ).devices


def compile_for(
    target: str, fun: Callable[..., Any], *args: Any, **jit_kwargs: Any
) -> jax.stages.Compiled:
    """Compiles a function for one device of a target.

    Args:
      target: a name of `targets()`.
      fun: a function of pytrees of arrays; compiled by `jax.jit`.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      **jit_kwargs: those of `jax.jit`, such as `donate_argnums`.

    Returns:
      What `.compile()` returns: `memory_analysis()`, `cost_analysis()` (empty for the
      H100) and `as_text()` are read from it.

    Raises:
      UnknownTarget: for a name that is none.
      MissingTargetPackage: as `target_devices`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.report import compile_for, has_target
      >>> x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)
      >>> if has_target("h100"):
      ...     compiled = compile_for("h100", lambda x: x + 1, x)
      ...     assert compiled.memory_analysis().output_size_in_bytes == 2 * 128 * 128
    """
    sharding = jax.sharding.SingleDeviceSharding(target_devices(target)[0])
    shapes = jax.eval_shape(lambda *args: args, *args)
    jitted = jax.jit(fun, in_shardings=sharding, out_shardings=sharding, **jit_kwargs)
    return jitted.lower(*shapes).compile()


def _missing_packages(target: str) -> list[str]:
    if target not in targets():
        raise UnknownTarget(
            f"There is no target {target!r}. Targets: {', '.join(targets())}."
        )
    kind = "h100" if target == "h100" else "tpu"
    return [name for name in _PACKAGES[kind] if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
