"""Lowered programs: what `jax.jit` keeps of them, and MLIR in their place."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxmp.errors import UnsupportedJaxVersion


def kept_arguments(lowered: Any) -> Sequence[int]:
    """Positions of the arguments that `jax.jit` has not left out as unused."""
    return sorted(_lowering(lowered).compile_args["kept_var_idx"])


def with_module(lowered: Any, module: Any) -> Any:
    """A lowered function whose program is another module of the same types."""
    _lowering(lowered)._hlo = module
    return lowered


def _lowering(lowered: Any) -> Any:
    found: Any = getattr(lowered, "_lowering", None)
    if not hasattr(found, "_hlo") or "kept_var_idx" not in found.compile_args:
        raise UnsupportedJaxVersion(
            f"JAX {jax.__version__} keeps lowered programs in a way that this version "
            "of jaxmp cannot read. Update jaxmp, or install jax<0.13."
        )
    return found


def merge_common_subexpressions(module: Any) -> None:
    """Merges equal operations of a StableHLO module, in place."""
    from jaxlib.mlir.passmanager import PassManager

    with module.context:
        PassManager.parse("builtin.module(cse)").run(module.operation)
