"""Splits an island at a softmax in it: before it, the softmax, after it.

The softmax has a gradient of its own; see `_softmax`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.atoms import is_literal, variables
from jaxmp._jaxpr.types import Atom, Var
from jaxmp.casting.islands import _arithmetic
from jaxmp.casting.islands._islands import Island, made_in_order, make_island
from jaxmp.casting.islands._softmax import Reads, Softmax, find_softmaxes
from jaxmp.casting.plan.plan import EqnPlan


def split_island(
    members: Sequence[EqnPlan], reads: Reads, in_half: set[Var]
) -> list[Island]:
    """One island, or what is before, in and after a softmax in it.

    Args:
      members: plans of the operations of one island, in order.
      reads: the dtypes in which their results are read outside.
      in_half: the variables that are stored in half.
    """
    readers: dict[Var, list[EqnPlan]] = {}
    for plan in members:
        for v in variables(plan.eqn.invars):
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
    reads = _reads_between(softmax, rest, half, reads)
    # The gradient flows to the scores alone: what makes the shift keeps nothing.
    ancestors = _ancestors(softmax.scores, before)
    is_curved = any(_arithmetic.is_nonlinear(p.eqn) for p in ancestors)
    islands = [make_island(before, reads, is_curved)] if before else []
    middle = make_island(list(softmax.members), reads, False)
    middle.softmax = _with_rounding(softmax, ancestors, half, in_half)
    islands.append(middle)
    return islands + (split_island(rest, reads, in_half) if rest else [])


def _reads_between(
    softmax: Softmax, rest: Sequence[EqnPlan], half: np.dtype, reads: Reads
) -> Reads:
    """What is read outside, once the parts of the island are islands of their own."""
    reads = dict(reads)

    def also_whole(atom: Atom) -> None:
        if not is_literal(atom):
            reads[atom] = {**reads.get(atom, {}), None: None}

    also_whole(softmax.scores)
    also_whole(softmax.shift)
    made_after = {softmax.result, *made_in_order(rest)}
    for plan in rest:
        for v in variables(plan.eqn.invars):
            if v not in made_after:
                also_whole(v)
    reads[softmax.result] = {half: None}
    return reads


def _with_rounding(
    softmax: Softmax, ancestors: Sequence[EqnPlan], half: np.dtype, in_half: set[Var]
) -> Softmax:
    """The softmax, with what is known of the operations that make its scores."""
    read = {v for p in ancestors for v in variables(p.eqn.invars)}
    halves = [v.aval.size for v in read & in_half]
    amplified = any(_arithmetic.amplifies(p.eqn) for p in ancestors)
    in_range = half != jnp.float16 or not amplified
    follows = all(_arithmetic.follows(p.eqn) for p in ancestors)
    rounds = bool(halves) and in_range and follows
    is_elementwise = all(_arithmetic.is_elementwise(p.eqn) for p in ancestors)
    # Two summands are twice the shares.
    is_as_small = sum(halves) < 2 * softmax.scores.aval.size
    return softmax._replace(
        rounds_scores=rounds, keeps_scores=rounds and is_elementwise and is_as_small
    )


def _descendants(softmax: Softmax, members: Sequence[EqnPlan]) -> set[int]:
    made, found = {softmax.result}, set()
    for plan in members:
        if not made.isdisjoint(variables(plan.eqn.invars)):
            made.update(plan.eqn.outvars)
            found.add(id(plan))
    return found


def _ancestors(result: Var, members: Sequence[EqnPlan]) -> list[EqnPlan]:
    needed, found = {result}, []
    for plan in reversed(members):
        if not needed.isdisjoint(plan.eqn.outvars):
            needed.update(variables(plan.eqn.invars))
            found.append(plan)
    return found


def _half_result(
    softmax: Softmax, rest: Sequence[EqnPlan], reads: Reads
) -> np.dtype | None:
    """The half dtype of the result, if it ends in half wherever it goes."""
    ends = [softmax.result, *made_in_order(rest)]
    dtypes = {dtype for v in ends for dtype in reads.get(v, {})}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= _tree.HALF else None
