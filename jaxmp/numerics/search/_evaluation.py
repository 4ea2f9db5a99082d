"""How far a set of float32 units leaves loss and gradients off.

kept units  ->  rules  ->  autocast(loss_fn, policy, rules)  ->  loss, gradients
                                                             ->  distance to float32
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.matmuls import operands
from jaxmp._jaxpr.primitives import ALL_MATMULS, SCALED_DOT
from jaxmp._jaxpr.types import Jaxpr
from jaxmp._jaxpr.walk import counted
from jaxmp.numerics.compare._distance import Distance, distances
from jaxmp.numerics.replay._interpreter import CompiledLoops
from jaxmp.numerics.replay._program import Program


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one set of units costs and gives.

    Attributes:
      kept: names of the units that compute in float32.
      loss_error: relative error of the loss, of the worst batch.
      gradient_error: relative error of the gradient of the worst parameter.
      half_flops: share of the matmul FLOPs, backward included, that run in half or in
        a smaller format.
      quantized_flops: share of those that run in float8 or int8.
    """

    kept: tuple[str, ...]
    loss_error: float
    gradient_error: float
    half_flops: float
    quantized_flops: float = 0.0

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(self.loss_error, self.gradient_error)


class Measured:
    """Loss and gradients of one batch.

    Attributes:
      loss: the loss.
      gradients: unscaled, in float64, by parameter.
    """

    def __init__(self, program: Program):
        outs = CompiledLoops().run_program(program)
        assert program.loss_index is not None
        self.loss = float(outs[program.loss_index])
        self.gradients = {
            name: np.asarray(x).astype(np.float64) / program.used_scale
            for name, x in program.gradients(outs).items()
        }

    @property
    def is_finite(self) -> bool:
        """Whether everything is."""
        return all(np.isfinite(x).all() for x in (self.loss, *self.gradients.values()))

    def errors(self, exact: "Measured") -> tuple[float, float]:
        """Relative errors of the loss and of the worst gradient."""
        loss = Distance()
        loss.add(np.float64(exact.loss), np.float64(self.loss))
        gradients = distances(exact.gradients, self.gradients).values()
        worst = max((x.relative_error for x in gradients), default=0.0)
        return loss.relative_error, worst


class FlopShares(NamedTuple):
    """Shares of the matmul FLOPs of a program.

    Attributes:
      half: that run in half, or in a smaller format.
      quantized: that run in float8 or int8.
    """

    half: float
    quantized: float


def flop_shares(jaxpr: Jaxpr) -> FlopShares:
    """In which formats the matmul FLOPs of a program run."""
    half = quantized = total = 0
    for eqn, times in counted(jaxpr):
        if eqn.primitive.name in ALL_MATMULS:
            flops = times * matmul_shape(eqn).flops
            is_quantized = eqn.primitive.name == SCALED_DOT
            total += flops
            half += flops * (is_quantized or operands(eqn)[0].dtype in _tree.HALF)
            quantized += flops * is_quantized
    return FlopShares(half / max(total, 1), quantized / max(total, 1))
