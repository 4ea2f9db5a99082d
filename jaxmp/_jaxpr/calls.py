"""How the primitives that hold jaxprs nest: what they hold, and what enters it.

Every reader of jaxprs that enters a call stands on this file.
"""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr, scan_arity

V = TypeVar("V")

JITS = ("jit",)
CHECKPOINTS = ("remat2",)
GROUPINGS = ("closed_call", "call", "eval_jaxpr")
"""Calls that only group equations."""
CUSTOM_JVPS = ("custom_jvp_call",)
CUSTOM_VJPS = ("custom_vjp_call",)
LOOPS = ("scan", "while")

BODY = MappingProxyType(
    {
        **dict.fromkeys((*JITS, *CHECKPOINTS), "jaxpr"),
        **dict.fromkeys((*GROUPINGS, *CUSTOM_JVPS, *CUSTOM_VJPS), "call_jaxpr"),
    }
)
"""The parameter that holds the jaxpr of a call which runs it once, on its operands."""

KERNELS = frozenset(("pallas_call", "core_map", "run_state"))
"""Programs of their own, on blocks of what is passed to them."""
REDUCERS = frozenset(("reduce", "reduce_window"))
"""What they hold says how two numbers become one: it is not a call."""


def is_jaxpr(value: Any) -> bool:
    """True for a jaxpr, with or without its constants."""
    return hasattr(value, "eqns")


def held(eqn: Eqn) -> list[Any]:
    """Every jaxpr among the parameters of an equation, in their order."""
    found = []
    for value in eqn.params.values():
        items = value if isinstance(value, (tuple, list)) else (value,)
        found += filter(is_jaxpr, items)
    return found


def bodies(eqn: Eqn) -> list[Any]:
    """As `held`, without what kernels and reductions hold."""
    return [] if eqn.primitive.name in KERNELS | REDUCERS else held(eqn)


def body(eqn: Eqn) -> Any:
    """The jaxpr that a call runs once, on its own operands; None for all others.

    Calls that `BODY` does not know count if their operands and results fit.
    """
    if eqn.primitive.name in KERNELS | REDUCERS:
        return None
    for name in ("jaxpr", "call_jaxpr"):
        found = eqn.params.get(name)
        if found is not None and is_jaxpr(open_jaxpr(found)):
            opened = open_jaxpr(found)
            takes = len(opened.invars) == len(eqn.invars)
            returns = len(opened.outvars) == len(eqn.outvars)
            return found if takes and returns else None
    return None


class Loop(NamedTuple):
    """A `scan` or a `while`, read.

    Attributes:
      body: the jaxpr of one iteration, of constants, carries and slices.
      condition: that of a `while`, of its own constants and the carries.
      condition_consts: how many constants only the condition takes.
      consts: how many constants the body takes.
      carries: how many values go from one iteration to the next.
      length: the number of iterations; None if it is not known.
    """

    body: Any
    condition: Any
    condition_consts: int
    consts: int
    carries: int
    length: int | None

    def split(self, values: Sequence[V]) -> tuple[Sequence[V], ...]:
        """Operands, or what is known of them, by what they are for.

        Returns:
          Those of the condition alone, the constants of the body, the carries, and
          what a scan slices.
        """
        first = self.condition_consts
        second = first + self.consts
        third = second + self.carries
        return (
            values[:first],
            values[first:second],
            values[second:third],
            values[third:],
        )

    def carried(self) -> Sequence[Any]:
        """The variables of the body that are carried."""
        inputs = open_jaxpr(self.body).invars
        return inputs[self.consts : self.consts + self.carries]


def loop(eqn: Eqn) -> Loop:
    """Reads the equation of a `scan` or a `while`."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        consts, carries = scan_arity(params)
        return Loop(params["jaxpr"], None, 0, consts, carries, params["length"])
    return Loop(
        params["body_jaxpr"],
        params["cond_jaxpr"],
        params["cond_nconsts"],
        params["body_nconsts"],
        len(eqn.outvars),
        None,
    )


def branches(eqn: Eqn) -> Sequence[Any]:
    """The jaxprs of a `cond`, each of all operands but the first."""
    return eqn.params["branches"]


def with_bodies(eqn: Eqn, *new: Jaxpr) -> dict[str, Any]:
    """The parameters of a call with other jaxprs in it.

    Args:
      eqn: the call.
      *new: jaxprs in the place of those it holds; of a `while`, the condition first.
    """
    name = eqn.primitive.name
    if name == "cond":
        return {**eqn.params, "branches": new}
    if name == "while":
        condition, body = new
        return {**eqn.params, "cond_jaxpr": condition, "body_jaxpr": body}
    (body,) = new
    return {**eqn.params, "jaxpr" if name == "scan" else BODY[name]: body}


def closed_over(eqn: Eqn) -> int:
    """How many of its first operands the function of a custom derivative closes over.

    The rule of the function skips them.
    """
    return eqn.params["num_consts"]


def function_name(jaxpr: Jaxpr) -> str | None:
    """The name of the function that a jaxpr was traced from, if JAX knows it."""
    info = getattr(open_jaxpr(jaxpr), "debug_info", None)
    return getattr(info, "func_name", None)


def manual_devices(eqn: Eqn) -> int:
    """On how many devices each equation in a `shard_map` runs."""
    sizes = eqn.params["mesh"].shape
    return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
