"""Islands: sets of float32 operations that hand values to each other.

An island is run as one function with half inputs and half outputs, so that one place
decides what its gradient keeps: under `jax.checkpoint`, the half inputs and what is
small (`_residuals`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxmp._jaxpr.atoms import variables
from jaxmp._jaxpr.types import Var
from jaxmp.casting.islands import _arithmetic
from jaxmp.casting.islands._residuals import bends_large, largest_small
from jaxmp.casting.islands._softmax import Reads, Softmax
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.plan.states import FLOAT32


@dataclasses.dataclass(slots=True, eq=False)
class Island:
    """Float32 operations that are run together.

    Attributes:
      members: plans of its equations, in order.
      inputs: variables from outside.
      outputs: variables with the dtypes in which others read them.
      recompute: whether its gradient computes it again from its inputs.
      softmax: set if the island is a single softmax.
    """

    members: Sequence[EqnPlan]
    inputs: tuple[Var, ...]
    outputs: tuple[tuple[Var, np.dtype | None], ...]
    recompute: bool
    softmax: Softmax | None = None


def make_island(members: Sequence[EqnPlan], reads: Reads, recompute: bool) -> Island:
    """Makes an island of operations.

    Args:
      members: their plans, in order.
      reads: the dtypes in which their results are read outside.
      recompute: whether to compute them again in a backward pass, if that saves memory.
    """
    made = made_in_order(members)
    read = (v for plan in members for v in variables(plan.eqn.invars))
    inside = set(made)
    inputs = dict.fromkeys(v for v in read if v not in inside)
    outputs = tuple((v, dtype) for v in made for dtype in _dtypes(reads, v))
    limit = largest_small(v.aval for v in inputs)
    saves = any(bends_large(plan.eqn, limit) for plan in members)
    return Island(members, tuple(inputs), outputs, recompute and saves)


def made_in_order(members: Sequence[EqnPlan]) -> list[Var]:
    """The results of equations, in order."""
    return [v for plan in members for v in plan.eqn.outvars]


def is_elementwise(island: Island) -> bool:
    """Whether an island is an activation such as GELU: no sum, no maximum, no shape.

    One that stops a gradient is not: all results of an activation are differentiated.
    """
    shapes = {v.aval.shape for v in made_in_order(island.members)} - {()}
    is_of_arrays = all(v.aval.shape in shapes for v, _ in island.outputs)
    return is_of_arrays and all(
        _arithmetic.is_elementwise(p.eqn) and not _arithmetic.stops_gradient(p.eqn)
        for p in island.members
    )


def _dtypes(reads: Reads, v: Var) -> list[np.dtype | None]:
    # Both dtypes None and float32 are the float32 value itself.
    return list(dict.fromkeys(None if d == FLOAT32 else d for d in reads.get(v, {})))
