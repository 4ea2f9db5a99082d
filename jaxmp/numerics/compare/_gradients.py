"""The last stage of `compare`: the gradients at a loss scale, and at scale 1."""

from typing import NamedTuple

from jaxmp._jaxpr.types import Array
from jaxmp.numerics.compare._candidates import Candidate
from jaxmp.numerics.compare._distance import distances
from jaxmp.numerics.compare._quantized import Measuring, QuantizedMatmuls
from jaxmp.numerics.compare._reference import Reference
from jaxmp.numerics.compare._scales import Scales
from jaxmp.numerics.compare.rows import GradientRow, tolerable


class Gradients(NamedTuple):
    """What a policy does to the gradients.

    Attributes:
      rows: one for each parameter.
      loss_scale: the one that was used; None without gradients.
      matmuls: the quantised matmuls, measured, those of the forward pass included; None
        without gradients.
    """

    rows: list[GradientRow]
    loss_scale: float | None
    matmuls: QuantizedMatmuls | None


def compare_gradients(
    candidate: Candidate, exact: Reference, scales: Scales
) -> Gradients:
    """Runs the backward pass under a policy, and compares the gradients."""
    if scales.chosen is None:
        return Gradients([], None, None)
    program = candidate.backward.at_scale(scales.chosen)
    scale = program.used_scale
    scaled, matmuls = _run(candidate, scales.chosen)
    unscaled = scaled if scale == 1.0 else _run(candidate, 1.0)[0]
    found = distances(exact.gradients, scaled, scale)
    plain = distances(exact.gradients, unscaled)
    limit = tolerable(matmuls)
    rows = [
        GradientRow(
            policy=candidate.policy,
            limit=limit,
            parameter=parameter,
            zeroed_unscaled=plain[parameter].underflow,
            **distance.figures(),
        )
        for parameter, distance in found.items()
    ]
    return Gradients(rows, scale, matmuls)


def _run(
    candidate: Candidate, loss_scale: float
) -> tuple[dict[str, Array], QuantizedMatmuls]:
    program, run = candidate.backward.at_scale(loss_scale), Measuring()
    return program.gradients(run.run_program(program)), run.matmuls
