"""The last matmuls of a function: no other reads what is computed from them.

In a network that is its head. Its logits decide the loss directly, and what rounds them
is never averaged out by a later layer.
"""

from collections.abc import Sequence

from jaxmp._jaxpr.atoms import is_integer, is_literal
from jaxmp._jaxpr.calls import CUSTOM_VJPS, LOOPS, body, branches, loop
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.scopes import is_backward
from jaxmp._jaxpr.types import Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp._jaxpr.walk import walk


def last_matmuls(jaxpr: Jaxpr) -> frozenset[int]:
    """The ids of the matmuls and convolutions that feed no other in a forward pass.

    Those in calls count too, if they do wherever the call stands.

    Args:
      jaxpr: of a whole function, backward pass included or not.
    """
    search = _Search()
    search.inputs(jaxpr, [False] * len(open_jaxpr(jaxpr).outvars))
    return frozenset(key for key, is_last in search.found.items() if is_last)


class _Search:
    """Reads jaxprs from their last equation to the first.

    Attributes:
      found: whether a matmul feeds no other, in every call that it stands in.
    """

    def __init__(self) -> None:
        self.found: dict[int, bool] = {}

    def inputs(self, jaxpr: Jaxpr, outs: Sequence[bool]) -> list[bool]:
        """Which inputs of a jaxpr feed a matmul, given which of its outputs do."""
        jaxpr = open_jaxpr(jaxpr)
        feeding: set[Var] = set()

        def note(atoms: Sequence[Var], feeds: Sequence[bool]) -> None:
            pairs = zip(atoms, feeds, strict=True)
            # Not through integers: a token that was chosen by its logit is looked up.
            feeding.update(
                v for v, does in pairs if does and not (is_literal(v) or is_integer(v))
            )

        note(jaxpr.outvars, outs)
        for eqn in reversed(jaxpr.eqns):
            if not is_backward(eqn):
                results = [v in feeding for v in eqn.outvars]
                note(eqn.invars, self.operands(eqn, results))
        return [v in feeding for v in jaxpr.invars]

    def operands(self, eqn: Eqn, results: Sequence[bool]) -> Sequence[bool]:
        """Which operands of an equation feed a matmul, given which results do."""
        name = eqn.primitive.name
        if name in MATMULS:
            is_last = not results[0]
            self.found[id(eqn)] = self.found.get(id(eqn), True) and is_last
            return [True] * len(eqn.invars)
        if name in LOOPS:
            return self.loop(eqn, results)
        if name == "cond":
            found = [self.inputs(branch, results) for branch in branches(eqn)]
            return [False, *map(any, zip(*found, strict=True))]
        inner = body(eqn)
        if inner is None or name in CUSTOM_VJPS:
            is_fed = any(results) or _has_matmul(inner)
            return [is_fed] * len(eqn.invars)
        return self.inputs(inner, results)

    def loop(self, eqn: Eqn, results: Sequence[bool]) -> Sequence[bool]:
        """A carry feeds what the next iteration feeds with it."""
        read = loop(eqn)
        carried, others = list(results[: read.carries]), results[read.carries :]
        while True:
            inputs = self.inputs(read.body, [*carried, *others])
            start, stop = read.consts, read.consts + read.carries
            fed = [a or b for a, b in zip(carried, inputs[start:stop], strict=True)]
            if fed == carried:
                unread = [False] * read.condition_consts
                return [*unread, *inputs[:start], *fed, *inputs[stop:]]
            carried = fed


def _has_matmul(jaxpr: Jaxpr | None) -> bool:
    if jaxpr is None:
        return False
    return any(eqn.primitive.name in MATMULS for eqn in walk(jaxpr))
