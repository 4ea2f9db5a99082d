"""Islands: sets of float32 operations that hand values to each other.

An island is run as one function with half inputs and half outputs, so that one place
decides what its gradient keeps: under `jax.checkpoint`, only the half inputs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.primitives import LAYOUT, LINEAR
from jaxmp._jaxpr.types import Eqn, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.islands._softmax import Reads, Softmax, find_softmaxes
from jaxmp.casting.ops import _registry
from jaxmp.casting.ops._op_lists import OpClass
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
      softmax: set if the island is no more than one softmax.
    """

    members: Sequence[EqnPlan]
    inputs: tuple[Var, ...]
    outputs: tuple[tuple[Var, np.dtype | None], ...]
    recompute: bool
    softmax: Softmax | None = None


def split_island(
    members: Sequence[EqnPlan], reads: Reads, in_half: set[Var]
) -> list[Island]:
    """One island, or what is before, in and after a softmax in it."""
    readers: dict[Var, list[EqnPlan]] = {}
    for plan in members:
        for v in plan.eqn.invars:
            if not is_literal(v):
                readers.setdefault(v, []).append(plan)
    found = find_softmaxes(members, readers, reads)
    if not found:
        return [make_island(members, reads, True)]
    softmax = found[0]
    core = set(map(id, softmax.members))
    after = _descendants(softmax, members)
    before = [p for p in members if id(p) not in core and id(p) not in after]
    rest = [p for p in members if id(p) in after]
    half = _half_result(softmax, rest, reads)
    if half is None:
        return [make_island(members, reads, True)]
    reads = dict(reads)
    for v in (softmax.scores, softmax.shift):
        if not is_literal(v):
            reads[v] = {**reads.get(v, {}), None: None}
    made_after = {softmax.result, *made_in_order(rest)}
    for plan in rest:
        for v in plan.eqn.invars:
            if not is_literal(v) and v not in made_after:
                reads[v] = {**reads.get(v, {}), None: None}
    reads[softmax.result] = {half: None}
    # The gradient flows to the scores alone: what makes the shift keeps nothing.
    ancestors = _ancestors(softmax.scores, before)
    is_curved = any(map(_is_nonlinear, ancestors))
    from_half = any(v in in_half for plan in ancestors for v in _variables(plan.eqn))
    in_range = half != jnp.float16 or not any(_amplifies(p.eqn) for p in ancestors)
    middle = make_island(list(softmax.members), reads, False)
    rounds = from_half and in_range and all(_follows(p.eqn) for p in ancestors)
    middle.softmax = softmax._replace(
        rounds_scores=rounds,
        keeps_scores=rounds and all(_is_elementwise(p.eqn) for p in ancestors),
    )
    islands = [make_island(before, reads, is_curved)] if before else []
    islands.append(middle)
    return islands + (split_island(rest, reads, in_half) if rest else [])


def _variables(eqn: Eqn) -> list[Any]:
    return [v for v in eqn.invars if not is_literal(v)]


def _descendants(softmax: Softmax, members: Sequence[EqnPlan]) -> set[int]:
    made, found = {softmax.result}, set()
    for plan in members:
        if any(not is_literal(v) and v in made for v in plan.eqn.invars):
            made.update(plan.eqn.outvars)
            found.add(id(plan))
    return found


def _ancestors(result: Var, members: Sequence[EqnPlan]) -> list[Any]:
    needed, found = {result}, []
    for plan in reversed(members):
        if any(v in needed for v in plan.eqn.outvars):
            needed.update(v for v in plan.eqn.invars if not is_literal(v))
            found.append(plan)
    return found


def _half_result(
    softmax: Softmax, rest: Sequence[EqnPlan], reads: Reads
) -> np.dtype | None:
    """The half dtype of the result, if it ends in half wherever it goes."""
    ends = [softmax.result, *made_in_order(rest)]
    dtypes = {dtype for v in ends for dtype in reads.get(v, {})}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= _tree.HALF else None


def make_island(members: Sequence[EqnPlan], reads: Reads, recompute: bool) -> Island:
    made = {v for plan in members for v in plan.eqn.outvars}
    inputs = dict.fromkeys(
        v
        for plan in members
        for v in plan.eqn.invars
        if not is_literal(v) and v not in made
    )
    outputs = tuple(
        (v, dtype) for v in made_in_order(members) for dtype in _of(reads, v)
    )
    is_nonlinear = any(_is_nonlinear(plan) for plan in members)
    return Island(members, tuple(inputs), outputs, recompute and is_nonlinear)


def made_in_order(members: Sequence[Any]) -> list[Any]:
    """The results of equations, in order."""
    return [v for plan in members for v in plan.eqn.outvars]


def _of(reads: Reads, v: Var) -> list[Any]:
    # Both dtypes None and float32 are the float32 value itself.
    dtypes = dict.fromkeys(None if d == FLOAT32 else d for d in reads.get(v, {}))
    return list(dtypes)


def _is_nonlinear(plan: EqnPlan) -> bool:
    return _needs_operands(plan.eqn)


def _follows(eqn: Eqn) -> bool:
    """Whether an equation would be in half if it were not for its readers."""
    if eqn.primitive.name == "jit":
        return all(map(_follows, open_jaxpr(eqn.params["jaxpr"]).eqns))
    is_follow = _registry.entry(eqn.primitive.name).op_class is OpClass.FOLLOW
    return is_follow or not any(map(castable_dtype, eqn.outvars))


def is_elementwise(island: Island) -> bool:
    """Whether an island is an activation such as GELU: no sum, no maximum, no shape.

    Nor is one that stops a gradient: all results of an activation are differentiated.
    """
    shapes = {v.aval.shape for v in made_in_order(island.members)} - {()}
    is_of_arrays = all(v.aval.shape in shapes for v, _ in island.outputs)
    return is_of_arrays and all(
        _is_elementwise(p.eqn) and not _stops(p.eqn) for p in island.members
    )


def _stops(eqn: Eqn) -> bool:
    if eqn.primitive.name == "jit":
        return any(map(_stops, open_jaxpr(eqn.params["jaxpr"]).eqns))
    return eqn.primitive.name == "stop_gradient"


def _is_elementwise(eqn: Eqn) -> bool:
    """Whether compilers can compute an equation while they read its operands."""
    if eqn.primitive.name == "jit":
        return all(map(_is_elementwise, open_jaxpr(eqn.params["jaxpr"]).eqns))
    if eqn.primitive.name in ("broadcast_in_dim", "copy", "copy_p", "stop_gradient"):
        return True
    shapes = {v.aval.shape for v in (*eqn.invars, *eqn.outvars)}
    return len(shapes - {()}) <= 1 and eqn.primitive.name not in LAYOUT


def _amplifies(eqn: Eqn) -> bool:
    """Whether an equation multiplies with a number above 1."""
    if eqn.primitive.name not in ("mul", "div"):
        return False
    numbers = [abs(v.val) for v in eqn.invars if is_literal(v)]
    return any(x > 1 if eqn.primitive.name == "mul" else x < 1 for x in numbers)


def _needs_operands(eqn: Eqn) -> bool:
    """Whether the gradient of an equation needs a floating operand of it."""
    name = eqn.primitive.name
    if name == "jit":
        return any(map(_needs_operands, open_jaxpr(eqn.params["jaxpr"]).eqns))
    if name in LINEAR or not any(map(castable_dtype, eqn.outvars)):
        return False
    if name in ("mul", "div"):
        # A factor of one number leaves no residual but, if it is learnt, its own.
        factors = eqn.invars if name == "mul" else eqn.invars[1:]
        return not any(is_literal(v) or v.aval.size == 1 for v in factors)
    return True
