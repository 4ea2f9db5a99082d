"""Which matmuls of a backward pass make the gradient of a weight.

Where a function differentiates itself, as a training step does, its matmuls stand in
one row. One that makes the gradient of an activation is read by what comes before it in
the network. One that makes the gradient of a weight is done: what it returns is moved,
cast and added to other gradients, until it leaves the backward pass.
"""

from collections.abc import Sequence

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.calls import LOOPS, body, branches, loop
from jaxmp._jaxpr.primitives import ADDS, CAST, COLLECTIVES, LAYOUT, MATMULS
from jaxmp._jaxpr.scopes import is_backward
from jaxmp._jaxpr.types import Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr

_MOVES = (LAYOUT | ADDS | COLLECTIVES - {"pmax", "pmin"}) | {
    CAST,
    "pad",
    "concatenate",
    "dynamic_slice",
    "dynamic_update_slice",
    "select_n",
    "neg",
    "split",
    "stack",
    "sum_apart",
    "unstack",
}


def weight_gradients(
    jaxpr: Jaxpr, of_weights: Sequence[bool] | None = None
) -> frozenset[int]:
    """The ids of the matmuls that make the gradients of weights, in calls too.

    Args:
      jaxpr: of a function that differentiates itself; or of a backward pass, if
        `of_weights` is given.
      of_weights: whether each of the results is the gradient of a weight.
    """
    search = _Search()
    in_backward = of_weights is not None
    outs = of_weights or [True] * len(open_jaxpr(jaxpr).outvars)
    search.inputs(jaxpr, outs, in_backward)
    return frozenset(key for key, is_one in search.found.items() if is_one)


class _Search:
    """Reads jaxprs from their last equation to the first.

    A value is *done* if all who read it only move it on to what is done.

    Attributes:
      found: whether a matmul is done in every call that it stands in.
    """

    def __init__(self) -> None:
        self.found: dict[int, bool] = {}

    def inputs(
        self, jaxpr: Jaxpr, outs: Sequence[bool], in_backward: bool
    ) -> list[bool]:
        """Which inputs of a jaxpr are done, given which of its outputs are."""
        jaxpr = open_jaxpr(jaxpr)
        read_on: set[Var] = set()

        def note(atoms: Sequence[Var], done: Sequence[bool]) -> None:
            pairs = zip(atoms, done, strict=True)
            read_on.update(v for v, is_done in pairs if not (is_done or is_literal(v)))

        note(jaxpr.outvars, outs)
        for eqn in reversed(jaxpr.eqns):
            results = [v not in read_on for v in eqn.outvars]
            if not (in_backward or is_backward(eqn)):
                continue
            note(eqn.invars, self.operands(eqn, results))
        return [v not in read_on for v in jaxpr.invars]

    def operands(self, eqn: Eqn, results: Sequence[bool]) -> Sequence[bool]:
        """Which operands are done as far as one equation of a backward pass reads."""
        name = eqn.primitive.name
        if name in MATMULS:
            self.found[id(eqn)] = self.found.get(id(eqn), True) and results[0]
        elif name in _MOVES:
            return [all(results)] * len(eqn.invars)
        elif _is_move(eqn):
            return [results[0]] * len(eqn.invars)
        elif name == "scan":
            return self.scan(eqn, results)
        elif name == "cond":
            found = [self.inputs(body, results, True) for body in branches(eqn)]
            return [False, *map(all, zip(*found, strict=True))]
        elif name not in LOOPS and (inner := body(eqn)) is not None:
            return self.inputs(inner, results, True)
        return [False] * len(eqn.invars)

    def scan(self, eqn: Eqn, results: Sequence[bool]) -> Sequence[bool]:
        """A gradient that a loop carries is done if it is only added to."""
        read = loop(eqn)
        carried, others = list(results[: read.carries]), results[read.carries :]
        while True:
            inputs = self.inputs(read.body, [*carried, *others], True)
            again = inputs[read.consts : read.consts + read.carries]
            kept = [a and b for a, b in zip(carried, again, strict=True)]
            if kept == carried:
                return inputs
            carried = kept


def _is_move(eqn: Eqn) -> bool:
    """Whether a sum is over axes of length 1, or a factor a number of the program's."""
    name = eqn.primitive.name
    if name == "reduce_sum":
        return eqn.invars[0].aval.size == eqn.outvars[0].aval.size
    return name in ("mul", "div") and any(map(is_literal, eqn.invars))
