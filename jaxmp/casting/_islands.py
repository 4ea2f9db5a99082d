"""Groups float32 operations into islands, and puts everything into an order to run.

An island is a set of float32 operations that hand values to each other. It is run as
one function with half inputs and half outputs, so that one place decides what its
gradient keeps: under `jax.checkpoint`, only the half inputs.

Two operations belong to one island if they are connected by a float32 value and no path
between them leaves the island. To know that without a search, every equation gets a
stage, which grows along each path and grows strictly where it leaves an island: members
that are connected and of the same stage form an island, and what would need them while
they run is of a later stage.
"""

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmp import _tree
from jaxmp._jax_internals import open_jaxpr
from jaxmp.casting import _registry
from jaxmp.casting._op_lists import OpClass
from jaxmp.casting._softmax import Softmax, find_softmaxes
from jaxmp.casting._states import FLOAT32, State, castable_dtype, is_literal


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

    members: list[Any]
    inputs: tuple[Any, ...]
    outputs: tuple[tuple[Any, np.dtype | None], ...]
    recompute: bool
    softmax: Softmax | None = None


def schedule(
    plans: Sequence[Any],
    jaxpr: Any,
    in_states: Sequence[State | None],
    out_states: Sequence[State | None],
    recompute: bool,
) -> list[Any]:
    """Orders the plans of a jaxpr's equations, those of islands together.

    Args:
      plans: of its equations, in their order.
      jaxpr: the jaxpr.
      in_states: the states of its inputs.
      out_states: the states of its outputs.
      recompute: whether the gradients of islands keep their half inputs only.

    Returns:
      A list of equation plans and `Island`s.
    """
    if not any(plan.in_island for plan in plans):
        return list(plans)
    producer = {v: i for i, plan in enumerate(plans) for v in plan.eqn.outvars}
    group = _groups(plans, producer)
    reads = _reads(plans, jaxpr, out_states, group, producer)
    in_half = {
        v for v, state in zip(jaxpr.invars, in_states, strict=True) if _low(state)
    }
    in_half.update(
        v
        for plan in plans
        for v, state in zip(plan.eqn.outvars, plan.out_states, strict=True)
        if _low(state)
    )
    members: dict[int, list[int]] = {}
    for i, g in enumerate(group):
        members.setdefault(g, []).append(i)
    steps = []
    for g in _order(plans, group, members, producer):
        if not plans[g].in_island:
            steps.append(plans[g])
            continue
        island = [plans[i] for i in members[g]]
        steps += (
            _split(island, reads, in_half)
            if recompute
            else [_island(island, reads, False)]
        )
    return steps


def _low(state: State | None) -> bool:
    return state is not None and state.is_low


def _stored_dtype(plan, v) -> np.dtype | None:
    state = plan.out_states[plan.eqn.outvars.index(v)]
    return None if state is None else state.dtype


def _groups(plans, producer) -> list[int]:
    """The first equation of the group that each equation belongs to."""
    stage = [0] * len(plans)
    parent = list(range(len(plans)))

    def find(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    last_effect = 0
    for i, plan in enumerate(plans):
        sources = _sources(plan, producer)
        for j in sources:
            leaves = plans[j].in_island and not plan.in_island
            stage[i] = max(stage[i], stage[j] + leaves)
        if plan.eqn.effects:
            stage[i] = last_effect = max(stage[i], last_effect)
        if plan.in_island:
            for j in sources:
                if plans[j].in_island and stage[j] == stage[i]:
                    a, b = find(i), find(j)
                    parent[max(a, b)] = min(a, b)
    return [find(i) for i in range(len(plans))]


def _sources(plan, producer) -> list[int]:
    return [producer[v] for v in plan.eqn.invars if not is_literal(v) and v in producer]


def _reads(plans, jaxpr, out_states, group, producer) -> dict[Any, dict[Any, None]]:
    """In which dtypes each value of an island is read from outside the island."""
    reads: dict[Any, dict[Any, None]] = {}
    for i, plan in enumerate(plans):
        for v, dtype in zip(plan.eqn.invars, plan.in_dtypes, strict=True):
            if is_literal(v) or v not in producer:
                continue
            source = producer[v]
            if plans[source].in_island and group[source] != group[i]:
                reads.setdefault(v, {})[dtype or _stored_dtype(plans[source], v)] = None
    for v, state in zip(jaxpr.outvars, out_states, strict=True):
        if not is_literal(v) and v in producer and plans[producer[v]].in_island:
            reads.setdefault(v, {})[state and state.dtype] = None
    return reads


def _order(plans, group, members, producer) -> list[int]:
    """Groups in an order that has every producer first, near the traced order."""
    waits: dict[int, set[int]] = {g: set() for g in members}
    readers: dict[int, list[int]] = {g: [] for g in members}
    last_effect = None
    for i, plan in enumerate(plans):
        needs = {group[j] for j in _sources(plan, producer)}
        if plan.eqn.effects:
            needs |= set() if last_effect is None else {last_effect}
            last_effect = group[i]
        for need in needs - {group[i]} - waits[group[i]]:
            waits[group[i]].add(need)
            readers[need].append(group[i])
    ready = [(members[g][-1], g) for g in members if not waits[g]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, g = heapq.heappop(ready)
        order.append(g)
        for reader in readers[g]:
            waits[reader].discard(g)
            if not waits[reader]:
                heapq.heappush(ready, (members[reader][-1], reader))
    return order


def _split(members, reads, in_half) -> list[Island]:
    """One island, or what is before, in and after a softmax in it."""
    readers: dict[Any, list[Any]] = {}
    for plan in members:
        for v in plan.eqn.invars:
            if not is_literal(v):
                readers.setdefault(v, []).append(plan)
    found = find_softmaxes(members, readers, reads)
    if not found:
        return [_island(members, reads, True)]
    softmax = found[0]
    core = set(map(id, softmax.members))
    after = _descendants(softmax, members)
    before = [p for p in members if id(p) not in core and id(p) not in after]
    rest = [p for p in members if id(p) in after]
    half = _half_result(softmax, rest, reads)
    if half is None:
        return [_island(members, reads, True)]
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
    middle = _island(list(softmax.members), reads, False)
    middle.softmax = softmax._replace(
        rounds_scores=from_half and all(_follows(plan.eqn) for plan in ancestors)
    )
    islands = [_island(before, reads, is_curved)] if before else []
    islands.append(middle)
    return islands + (_split(rest, reads, in_half) if rest else [])


def _variables(eqn) -> list[Any]:
    return [v for v in eqn.invars if not is_literal(v)]


def _descendants(softmax, members) -> set[int]:
    made, found = {softmax.result}, set()
    for plan in members:
        if any(not is_literal(v) and v in made for v in plan.eqn.invars):
            made.update(plan.eqn.outvars)
            found.add(id(plan))
    return found


def _ancestors(result, members) -> list[Any]:
    needed, found = {result}, []
    for plan in reversed(members):
        if any(v in needed for v in plan.eqn.outvars):
            needed.update(v for v in plan.eqn.invars if not is_literal(v))
            found.append(plan)
    return found


def _half_result(softmax, rest, reads) -> np.dtype | None:
    """The half dtype of the result, if it ends in half wherever it goes."""
    ends = [softmax.result, *made_in_order(rest)]
    dtypes = {dtype for v in ends for dtype in reads.get(v, {})}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= _tree.HALF else None


def _island(members, reads, recompute) -> Island:
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


def _of(reads, v) -> list[Any]:
    # Both dtypes None and float32 are the float32 value itself.
    dtypes = dict.fromkeys(None if d == FLOAT32 else d for d in reads.get(v, {}))
    return list(dtypes)


def _is_nonlinear(plan) -> bool:
    return _needs_operands(plan.eqn)


def _follows(eqn) -> bool:
    """Whether an equation would be in half if it were not for its readers."""
    if eqn.primitive.name == "jit":
        return all(map(_follows, open_jaxpr(eqn.params["jaxpr"]).eqns))
    is_follow = _registry.entry(eqn.primitive.name).op_class is OpClass.FOLLOW
    return is_follow or not any(map(castable_dtype, eqn.outvars))


def _needs_operands(eqn) -> bool:
    """Whether the gradient of an equation needs a floating operand of it."""
    name = eqn.primitive.name
    if name == "jit":
        return any(map(_needs_operands, open_jaxpr(eqn.params["jaxpr"]).eqns))
    if name in _registry.LINEAR or not any(map(castable_dtype, eqn.outvars)):
        return False
    if name in ("mul", "div"):
        # A factor of one number leaves no residual but, if it is learnt, its own.
        factors = eqn.invars if name == "mul" else eqn.invars[1:]
        return not any(is_literal(v) or v.aval.size == 1 for v in factors)
    return True
