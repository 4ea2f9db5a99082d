"""Programs as XLA's own TPU and H100 compilers see them, without the machine."""

from jaxmp.report._batch import BatchSearch, max_batch_size
from jaxmp.report._step import Row, StepReport, compile_step, compile_step_of
from jaxmp.report.audit._audit import audit
from jaxmp.report.audit._findings import Finding
from jaxmp.report.audit._result import Audit
from jaxmp.report.audit._widenings import Widening
from jaxmp.report.compile.chips import Chip, chips
from jaxmp.report.compile.targets import (
    TARGET_ENVIRONMENT,
    compile_for,
    has_target,
    target_devices,
    targets,
)
from jaxmp.report.hlo._contents import Contents, Total
from jaxmp.report.hlo._liveness import LiveBuffers
from jaxmp.report.hlo._roofline import Roofline

__all__ = [
    "compile_step",
    "compile_step_of",
    "StepReport",
    "Row",
    "Contents",
    "Total",
    "LiveBuffers",
    "Roofline",
    "max_batch_size",
    "BatchSearch",
    "Chip",
    "chips",
    "audit",
    "Audit",
    "Finding",
    "Widening",
    "TARGET_ENVIRONMENT",
    "compile_for",
    "has_target",
    "target_devices",
    "targets",
]
