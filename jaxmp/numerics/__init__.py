"""Values of a training run: what underflows, what overflows, where a NaN comes from."""

from jaxmp.numerics.compare._compare import compare
from jaxmp.numerics.compare._result import Comparison
from jaxmp.numerics.monitor._bad_batch import (
    BadBatch,
    load_bad_batch,
    no_bad_batch,
    record_bad_batch,
)
from jaxmp.numerics.monitor._measurement import Measurement, get_statistics
from jaxmp.numerics.monitor._monitor import monitor
from jaxmp.numerics.monitor._plots import plot_loss_scale, plot_underflow
from jaxmp.numerics.monitor._report import MonitorReport, monitor_report
from jaxmp.numerics.nonfinite._find import find_nonfinite
from jaxmp.numerics.nonfinite._report import NonfiniteReport
from jaxmp.numerics.ranges._plot import plot_exponents
from jaxmp.numerics.ranges._statistics import Statistics, statistics
from jaxmp.numerics.search._result import PolicySearch
from jaxmp.numerics.search._search import search_policy
from jaxmp.numerics.trace._result import Trace
from jaxmp.numerics.trace._trace import trace

__all__ = [
    "trace",
    "Trace",
    "compare",
    "Comparison",
    "search_policy",
    "PolicySearch",
    "find_nonfinite",
    "NonfiniteReport",
    "statistics",
    "Statistics",
    "monitor",
    "get_statistics",
    "Measurement",
    "monitor_report",
    "MonitorReport",
    "record_bad_batch",
    "no_bad_batch",
    "load_bad_batch",
    "BadBatch",
    "plot_exponents",
    "plot_underflow",
    "plot_loss_scale",
]
