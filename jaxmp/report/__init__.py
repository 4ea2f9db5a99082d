"""Programs as XLA's own TPU and H100 compilers see them, without the machine."""

from jaxmp.report._audit import audit
from jaxmp.report._audit_findings import Finding
from jaxmp.report._audit_result import Audit
from jaxmp.report._audit_widenings import Widening
from jaxmp.report._batch import BatchSearch, max_batch_size
from jaxmp.report._chips import Chip, chips
from jaxmp.report._contents import Contents, Total
from jaxmp.report._liveness import LiveBuffers
from jaxmp.report._roofline import Roofline
from jaxmp.report._step import Row, StepReport, compile_step, compile_step_of
from jaxmp.report._targets import (
    TARGET_ENVIRONMENT,
    compile_for,
    has_target,
    target_devices,
    targets,
)

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
