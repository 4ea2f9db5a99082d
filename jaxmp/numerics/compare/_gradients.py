"""The last stage of `compare`: the gradients at a loss scale, and at scale 1."""

from typing import NamedTuple

from jaxmp._jaxpr.types import Array
from jaxmp.numerics.compare._candidates import Candidate
from jaxmp.numerics.compare._distance import distances
from jaxmp.numerics.compare._reference import Reference
from jaxmp.numerics.compare._scales import Scales
from jaxmp.numerics.compare._stand_in import Rounding
from jaxmp.numerics.compare.rows import GradientRow


class Gradients(NamedTuple):
    """What a policy does to the gradients.

    Attributes:
      rows: one for each parameter.
      loss_scale: the one that was used; None without gradients.
    """

    rows: list[GradientRow]
    loss_scale: float | None


def compare_gradients(
    candidate: Candidate, exact: Reference, scales: Scales
) -> Gradients:
    """Runs the backward pass under a policy, and compares the gradients."""
    if scales.chosen is None:
        return Gradients([], None)
    program = candidate.backward.at_scale(scales.chosen)
    scale = program.used_scale
    scaled = _run(candidate, scales.chosen)
    unscaled = scaled if scale == 1.0 else _run(candidate, 1.0)
    found = distances(exact.gradients, scaled, scale)
    plain = distances(exact.gradients, unscaled)
    rows = [
        GradientRow(
            policy=candidate.policy,
            parameter=parameter,
            zeroed_unscaled=plain[parameter].underflow,
            **distance.figures(),
        )
        for parameter, distance in found.items()
    ]
    return Gradients(rows, scale)


def _run(candidate: Candidate, loss_scale: float) -> dict[str, Array]:
    program = candidate.backward.at_scale(loss_scale)
    return program.gradients(Rounding(candidate.emulated).run_program(program))
