"""Programs as XLA's own TPU and H100 compilers see them, without the machine."""

from jaxmp.report._targets import (
    TARGET_ENVIRONMENT,
    compile_for,
    has_target,
    target_devices,
    targets,
)

__all__ = [
    "TARGET_ENVIRONMENT",
    "compile_for",
    "has_target",
    "target_devices",
    "targets",
]
