"""The largest loss scale at which the gradients of a program are finite."""

import math
from collections.abc import Callable
from typing import Any

from jaxmp.numerics.nonfinite._origin import nonfinite
from jaxmp.numerics.nonfinite._provenance import jit_exactly
from jaxmp.numerics.replay._interpreter import Interpreter, bind
from jaxmp.numerics.replay._program import Program

LOWEST_EXPONENT = -24


class _CompiledLoops(Interpreter):
    """Operation by operation, but for loops, which need no looking into."""

    def __init__(self):
        super().__init__()
        self._loops: dict[int, Callable[..., list[Any]]] = {}

    def loop(self, site, operands):
        if id(site.eqn) not in self._loops:
            eqn = site.eqn
            self._loops[id(eqn)] = jit_exactly(lambda *values: bind(eqn, values))
        return self._loops[id(site.eqn)](*operands)


def finite_scale(program: Program) -> float | None:
    """The largest power of two below the loss scale at which gradients are finite."""
    run = _CompiledLoops()

    def is_finite(exponent):
        outs = run.run_program(program.at_scale(2.0**exponent))
        gradients = [
            x
            for x, output in zip(outs, program.outputs, strict=True)
            if output.kind == "gradient"
        ]
        return not any(nonfinite(gradients))

    assert program.loss_scale is not None
    high = math.ceil(math.log2(program.loss_scale))
    low = min(LOWEST_EXPONENT, high - 1)
    if not is_finite(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_finite(middle) else (low, middle)
    return 2.0**low
