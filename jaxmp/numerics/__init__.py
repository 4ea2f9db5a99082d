"""Values of a training run: what underflows, what overflows, where a NaN comes from."""

from jaxmp.numerics._statistics import EXPONENTS, Statistics, statistics

__all__ = [
    "statistics",
    "Statistics",
    "EXPONENTS",
]
