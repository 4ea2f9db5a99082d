"""Which values of a program are sums of sums: what loops carry, additions in a row."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxmp import _tree
from jaxmp._jaxpr.versions import open_jaxpr, scan_arity

_ADDITIONS = ("add", "add_any", "sub")
# What hands on what it is given, moved about or in another dtype.
_MOVES = frozenset(
    (
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "gpu_barrier",
        "copy_p",
        "expand_dims",
        "name",
        "optimization_barrier",
        "pvary",
        "reduce_precision",
        "reshape",
        "sharding_constraint",
        "squeeze",
        "transpose",
    )
)


@dataclasses.dataclass(frozen=True)
class Carry:
    """A value that a loop carries, and to which it adds.

    Attributes:
      aval: its shape and dtype.
      added: the equation that adds.
      terms: how many terms are added in all iterations; None in a `while`.
      depends_on_itself: whether what is added is computed from the carry.
    """

    aval: Any
    added: Any
    terms: int | None
    depends_on_itself: bool


class Chains:
    """Follows what a loop carries from the end of its body back to the beginning.

    Args:
      loop: the equation of a `scan` or `while`.
    """

    def __init__(self, loop: Any):
        if loop.primitive.name == "scan":
            body = open_jaxpr(loop.params["jaxpr"])
            first, count = scan_arity(loop.params)
            self.length: int | None = loop.params["length"]
        else:
            body = open_jaxpr(loop.params["body_jaxpr"])
            first = loop.params["body_nconsts"]
            count = len(body.outvars)
            self.length = None
        self.body = body
        self.carries = body.invars[first : first + count]

    def carried(self) -> Iterator[Carry]:
        """The carries that are sums, as far as their dtype is floating."""
        for variable, out in zip(self.carries, self.body.outvars, strict=False):
            dtype = getattr(variable.aval, "dtype", None)
            if dtype not in _tree.HALF:
                continue
            found = _follow(self.body, out, variable)
            if found is not None and found[0]:
                per_iteration, added = found
                terms = None
                if self.length is not None:
                    terms = math.ceil(self.length * per_iteration)
                depends = _depends(self.body, added, variable)
                yield Carry(variable.aval, added, terms, depends)


def _follow(jaxpr: Any, out: Any, start: Any) -> tuple[float, Any] | None:
    """How many terms are added on the way from one variable to another, and where.

    None if there is no way that consists of additions.
    """
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def back(v: Any) -> tuple[float, Any] | None:
        if v is start:
            return 0, None
        if hasattr(v, "val") or v not in makers:
            return None
        eqn = makers[v]
        for operand, terms, added in _summands(eqn, eqn.outvars.index(v)):
            found = back(operand)
            if found is not None:
                return found[0] + terms, added if added is not None else found[1]
        return None

    return back(out)


def _summands(eqn: Any, index: int) -> Iterator[tuple[Any, float, Any]]:
    """The operands that a result may be a sum of: operand, terms added, by what."""
    name = eqn.primitive.name
    if name in _ADDITIONS:
        for operand in eqn.invars[: 1 if name == "sub" else 2]:
            yield operand, 1, eqn
    elif name in _MOVES:
        yield eqn.invars[index if name == "optimization_barrier" else 0], 0, None
    elif name == "select_n":
        for operand in eqn.invars[1:]:
            yield operand, 0, None
    elif name == "scatter-add":
        rows, places = scattered(eqn)
        yield eqn.invars[0], rows / places, eqn
    elif name in ("scan", "jit", "pjit", "remat2", "checkpoint", "closed_call"):
        yield from _of_body(eqn, index)


def _of_body(eqn: Any, index: int) -> Iterator[tuple[Any, float, Any]]:
    """The same through the body of a call, or what a loop inside carries."""
    params = eqn.params
    body = open_jaxpr(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])
    out, times, positions = body.outvars[index], 1, range(len(body.invars))
    if eqn.primitive.name == "scan":
        first, count = scan_arity(params)
        if index >= count:
            return
        times, positions = params["length"], range(first + index, first + index + 1)
    for position in positions:
        if body.invars[position].aval.shape != out.aval.shape:
            continue
        found = _follow(body, out, body.invars[position])
        if found is not None:
            yield eqn.invars[position], times * found[0], found[1]


def scattered(eqn: Any) -> tuple[int, int]:
    """How many rows a `scatter-add` adds, and how many places it has for them."""
    dims = eqn.params["dimension_numbers"]
    operand, indices = (v.aval.shape for v in eqn.invars[:2])
    batched = math.prod(operand[i] for i in dims.operand_batching_dims)
    rows = math.prod(indices[:-1]) // max(batched, 1)
    places = math.prod(operand[i] for i in dims.scatter_dims_to_operand_dims)
    return rows, max(places, 1)


def _depends(jaxpr: Any, added: Any, start: Any) -> bool:
    """Whether what an equation adds is computed from a variable, besides the sum.

    Also if the equation is inside of a call, where this is not looked for.
    """
    made = {start}
    for eqn in jaxpr.eqns:
        given = [v for v in eqn.invars if not hasattr(v, "val") and v in made]
        if eqn is added:
            return len(given) > 1
        if given:
            made.update(eqn.outvars)
    return True


def additions_in_a_row(jaxpr: Any) -> Iterator[tuple[Any, int]]:
    """The last of each row of half-precision additions, and how many terms it has."""
    depth: dict[Any, int] = {}
    ends: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [v for v in eqn.invars if not hasattr(v, "val")]
        before = max((depth.get(v, 0) for v in inputs), default=0)
        if name in ("add", "add_any") and eqn.outvars[0].aval.dtype in _tree.HALF:
            for v in inputs:
                ends.pop(v, None)
            depth[eqn.outvars[0]] = before + 1
            ends[eqn.outvars[0]] = eqn
        elif name in _MOVES and before and eqn.outvars[0].aval.dtype in _tree.HALF:
            for v in inputs:
                if v in ends:
                    ends[eqn.outvars[0]] = ends.pop(v)
            depth[eqn.outvars[0]] = before
    for v, eqn in ends.items():
        yield eqn, depth[v] + 1
