"""How many terms a reduction or a `scatter-add` adds up."""

import math

from jaxmp._jaxpr.types import Eqn
from jaxmp._jaxpr.versions import open_jaxpr

REDUCTIONS = ("reduce_sum", "cumsum", "reduce_window_sum", "reduce_window")
SCATTER = "scatter-add"


def terms_of_reduction(eqn: Eqn) -> int:
    """How many numbers an equation of one of `REDUCTIONS` adds up to one."""
    shape, params = eqn.invars[0].aval.shape, eqn.params
    if eqn.primitive.name == "cumsum":
        return shape[params["axis"]]
    if eqn.primitive.name == "reduce_sum":
        return math.prod(shape[axis] for axis in params["axes"])
    if "jaxpr" in params:
        inside = [e.primitive.name for e in open_jaxpr(params["jaxpr"]).eqns]
        if inside != ["add"]:
            return 0
    return math.prod(params["window_dimensions"])


def rows_of_scatter(eqn: Eqn) -> tuple[int, int]:
    """How many rows a `scatter-add` adds, and how many places it has for them."""
    dims = eqn.params["dimension_numbers"]
    operand, indices = (v.aval.shape for v in eqn.invars[:2])
    batched = math.prod(operand[i] for i in dims.operand_batching_dims)
    rows = math.prod(indices[:-1]) // max(batched, 1)
    places = math.prod(operand[i] for i in dims.scatter_dims_to_operand_dims)
    return rows, max(places, 1)
