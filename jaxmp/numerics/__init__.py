"""Values of a training run: what underflows, what overflows, where a NaN comes from."""

from jaxmp.numerics._bad_batch import (
    BadBatch,
    load_bad_batch,
    no_bad_batch,
    record_bad_batch,
)
from jaxmp.numerics._plots import plot_exponents, plot_loss_scale, plot_underflow
from jaxmp.numerics._statistics import EXPONENTS, Statistics, statistics
from jaxmp.numerics.compare._compare import compare
from jaxmp.numerics.compare._result import Comparison
from jaxmp.numerics.compare.rows import ActivationRow, GradientRow, PolicyRow
from jaxmp.numerics.monitor._measurement import Measurement, get_statistics
from jaxmp.numerics.monitor._monitor import MonitorState, monitor
from jaxmp.numerics.monitor._report import (
    LeafReport,
    MonitorReport,
    monitor_report,
)
from jaxmp.numerics.nonfinite._find import find_nonfinite
from jaxmp.numerics.nonfinite._report import NonfiniteReport
from jaxmp.numerics.search._evaluate import Evaluation
from jaxmp.numerics.search._result import Kept, PolicySearch
from jaxmp.numerics.search._search import search_policy
from jaxmp.numerics.trace._result import Trace, TraceRow
from jaxmp.numerics.trace._trace import trace

__all__ = [
    "trace",
    "Trace",
    "TraceRow",
    "compare",
    "Comparison",
    "PolicyRow",
    "ActivationRow",
    "GradientRow",
    "search_policy",
    "PolicySearch",
    "Kept",
    "Evaluation",
    "find_nonfinite",
    "NonfiniteReport",
    "statistics",
    "Statistics",
    "EXPONENTS",
    "monitor",
    "get_statistics",
    "Measurement",
    "MonitorState",
    "monitor_report",
    "MonitorReport",
    "LeafReport",
    "record_bad_batch",
    "no_bad_batch",
    "load_bad_batch",
    "BadBatch",
    "plot_exponents",
    "plot_underflow",
    "plot_loss_scale",
]
