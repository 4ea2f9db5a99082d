"""The largest loss scale at which the gradients of a program are finite."""

import math

from jaxmp.numerics.ranges._finiteness import nonfinite
from jaxmp.numerics.replay._interpreter import CompiledLoops
from jaxmp.numerics.replay._program import Program

LOWEST_EXPONENT = -24


def finite_scale(program: Program) -> float | None:
    """The largest power of two below the loss scale at which gradients are finite."""
    run = CompiledLoops()

    def is_finite(exponent: int) -> bool:
        outs = run.run_program(program.at_scale(2.0**exponent))
        return not any(nonfinite(list(program.gradients(outs).values())))

    assert program.loss_scale is not None
    high = math.ceil(math.log2(program.loss_scale))
    low = min(LOWEST_EXPONENT, high - 1)
    if not is_finite(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_finite(middle) else (low, middle)
    return 2.0**low
