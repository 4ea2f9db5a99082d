"""Which matmuls the gradients of a program come from, read from its jaxpr alone.

A gradient is followed backwards through what only moves, casts, scales or adds it, and
through calls and loops, to the matmuls and convolutions that made it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.calls import body, branches, loop
from jaxmp._jaxpr.primitives import ADDS, CAST, LAYOUT, MATMULS
from jaxmp._jaxpr.types import Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr

MOVES = (LAYOUT | ADDS | {CAST, "pad", "concatenate", "dynamic_update_slice"}) | {
    "dynamic_slice",
    "split",
    "stack",
    "unstack",
    "neg",
    "cpu_barrier",
    "optimization_barrier",
    "sum_apart",
    "psum",
    "psum_invariant",
    "reduce_scatter",
}
PICKED = ("select_n",)


def gradient_sources(fn: Callable[..., Any], *args: Any) -> dict[str, list[Eqn]]:
    """The matmuls that each array of a function's result is moved or added up from.

    Args:
      fn: returns a tree of gradients.
      *args: its arguments.

    Returns:
      Equations by the path of the result.
    """
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(shapes)]
    return {
        path: list(_sources(jaxpr.jaxpr, (i,))[0].values())
        for i, path in enumerate(paths)
    }


Found = tuple[dict[int, Eqn], set[int]]
"""Matmuls by their id, and the positions of the inputs that are passed on."""


def _sources(jaxpr: Jaxpr, outputs: Sequence[int]) -> Found:
    jaxpr = open_jaxpr(jaxpr)
    makers = {v: (e, i) for e in jaxpr.eqns for i, v in enumerate(e.outvars)}
    inputs = {v: i for i, v in enumerate(jaxpr.invars)}
    found: dict[int, Eqn] = {}
    passed: set[int] = set()
    seen: set[Var] = set()
    pending = [jaxpr.outvars[i] for i in outputs]
    while pending:
        v = pending.pop()
        if is_literal(v) or v in seen:
            continue
        seen.add(v)
        if v in inputs:
            passed.add(inputs[v])
        if v not in makers:
            continue
        eqn, position = makers[v]
        matmuls, operands = _of_equation(eqn, position)
        found.update(matmuls)
        pending += [eqn.invars[i] for i in operands]
    return found, passed


def _of_equation(eqn: Eqn, position: int) -> Found:
    name = eqn.primitive.name
    if name in MATMULS:
        return {id(eqn): eqn}, set()
    if name in MOVES:
        return {}, set(range(len(eqn.invars)))
    if name == "reduce_sum" and eqn.invars[0].aval.size == eqn.outvars[0].aval.size:
        return {}, {0}
    if name in ("mul", "div") and any(map(is_literal, eqn.invars)):
        return {}, {0, 1}
    if name in PICKED:
        return {}, set(range(1, len(eqn.invars)))
    if name == "cond":
        parts = [_sources(branch, (position,)) for branch in branches(eqn)]
        found = {k: e for matmuls, _ in parts for k, e in matmuls.items()}
        return found, {i + 1 for _, inputs in parts for i in inputs}
    if name in ("scan", "while"):
        return _of_loop(eqn, position)
    inner = body(eqn)
    if inner is None:
        return {}, set()
    return _sources(inner, (position,))


def _of_loop(eqn: Eqn, position: int) -> Found:
    read = loop(eqn)
    outputs = {position}
    while True:
        found, inputs = _sources(read.body, sorted(outputs))
        carried = {i - read.consts for i in inputs if i >= read.consts}
        more = outputs | {i for i in carried if i < read.carries}
        if more == outputs:
            return found, {i + read.condition_consts for i in inputs}
        outputs = more
