"""Programs as XLA's own TPU and H100 compilers see them, without the machine."""

from jaxmp.report._check_policy import check_policy
from jaxmp.report._compile_step import compile_step, compile_step_of
from jaxmp.report._max_batch_size import BatchSearch, max_batch_size
from jaxmp.report._step_report import StepReport
from jaxmp.report.audit._audit import audit
from jaxmp.report.audit._result import Audit
from jaxmp.report.compile.chips import chips
from jaxmp.report.compile.targets import (
    compile_for,
    has_target,
    target_devices,
    targets,
)

__all__ = [
    "compile_step",
    "compile_step_of",
    "StepReport",
    "max_batch_size",
    "BatchSearch",
    "chips",
    "check_policy",
    "audit",
    "Audit",
    "compile_for",
    "has_target",
    "target_devices",
    "targets",
]
