"""`Cause`: what went wrong in an operation, in plain words, and how it is shown."""

from typing import NamedTuple

from jaxmp.errors import NumericsError
from jaxmp.numerics.nonfinite._origin import Operand, Origin
from jaxmp.numerics.ranges._formats import format_range


class Cause(NamedTuple):
    """What happened, and what to do about it."""

    cause: str
    repair: str


def overflows(made: Origin, what: str) -> str:
    """Says that a number is too large for the dtype of the result."""
    dtype = made.gave.dtype
    try:
        largest = format_range(dtype).largest
    except NumericsError:  # complex
        return f"{what} overflows {dtype}"
    return f"{what} overflows {dtype}, whose largest is {number(largest)}"


def at(operand: Operand) -> str:
    """The operand's number at the element, or its range."""
    if operand.at is not None:
        return number(operand.at)
    return f"numbers between {number(operand.low)} and {number(operand.high)}"


def number(x: float) -> str:
    """A number with as many digits as people want to read."""
    return f"{x:.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.4g}"
