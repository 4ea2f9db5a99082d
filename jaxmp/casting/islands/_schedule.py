"""Groups float32 operations into islands, and puts everything into an order to run.

Two operations belong to one island if they are connected by a float32 value and no path
between them leaves the island. To know that without a search, every equation gets a
stage, which grows along each path and grows strictly where it leaves an island: members
that are connected and of the same stage form an island, and what would need them while
they run is of a later stage.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.types import Jaxpr, Var
from jaxmp.casting.islands._islands import make_island
from jaxmp.casting.islands._split import split_island
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.plan.states import State


def schedule(
    plans: Sequence[Any],
    jaxpr: Jaxpr,
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
            split_island(island, reads, in_half)
            if recompute
            else [make_island(island, reads, False)]
        )
    return steps


def _low(state: State | None) -> bool:
    return state is not None and state.is_low


def _stored_dtype(plan: EqnPlan, v: Var) -> np.dtype | None:
    state = plan.out_states[plan.eqn.outvars.index(v)]
    return None if state is None else state.dtype


def _groups(plans: Sequence[EqnPlan], producer: dict[Var, int]) -> list[int]:
    """The first equation of the group that each equation belongs to."""
    stage = [0] * len(plans)
    parent = list(range(len(plans)))

    def find(i: int) -> int:
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


def _sources(plan: EqnPlan, producer: dict[Var, int]) -> list[int]:
    return [producer[v] for v in plan.eqn.invars if not is_literal(v) and v in producer]


def _reads(
    plans: Sequence[EqnPlan],
    jaxpr: Jaxpr,
    out_states: Sequence[State | None],
    group: Sequence[int],
    producer: dict[Var, int],
) -> dict[Any, dict[Any, None]]:
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


def _order(
    plans: Sequence[EqnPlan],
    group: Sequence[int],
    members: dict[int, list[int]],
    producer: dict[Var, int],
) -> list[int]:
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
