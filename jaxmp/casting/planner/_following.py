"""What an operation does that follows its operands: an ordered table of cases.

Elementwise arithmetic and movement of data have no dtype of their own. They take that
of their neighbours: of the operands, by how each came to its dtype (`Kind`), and of
those who read the result (`Wants`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype, is_literal
from jaxmp._jaxpr.types import Eqn
from jaxmp.casting.plan.states import FULL, KEPT, NEUTRAL, PINNED, Kind, State
from jaxmp.casting.planner._intents import selects
from jaxmp.casting.planner._interface import Wants
from jaxmp.casting.planner._island_inputs import IslandInputs

# Products and quotients with an island's result are gates and normalisations; sums
# with it are residual streams.
_GATES = frozenset(("mul", "div"))
# What a checkpoint policy saves by name is saved in half.
_BARRIERS = frozenset(("name", "optimization_barrier"))


class Choice(NamedTuple):
    """The state that an operation takes, and why."""

    state: State
    reason: str


class Follower:
    """An operation that follows, and its neighbours.

    Args:
      eqn: the operation.
      states: of its operands.
      wants: who reads its results.
      low: the state of the compute dtype.
      in_backward: whether it is part of a backward pass.
      islands: which low values feed the float32 islands so far.
    """

    def __init__(
        self,
        eqn: Eqn,
        states: Sequence[State | None],
        wants: Wants,
        low: State,
        in_backward: bool,
        islands: IslandInputs,
    ):
        pairs = zip(eqn.invars, states, strict=True)
        known = [s for v, s in pairs if s is not None and not is_literal(v)]
        self.eqn = eqn
        self.kinds = {s.kind for s in known}
        self.lows = [s for s in known if s.is_low]
        self._states = states
        self._wants = wants
        self._compute = low
        self._in_backward = in_backward
        self._islands = islands

    # States

    def low(self) -> State:
        """The half state of its operands, or of the compute dtype."""
        state = self.lows[0] if self.lows else self._compute
        is_gradient = Kind.GRADIENT in self.kinds
        return State(Kind.GRADIENT, state.dtype) if is_gradient else state

    def in_half(self) -> State:
        """An ordinary half value, a gradient too."""
        return State(Kind.LOW, self.low().dtype)

    def pinned(self) -> State:
        """What a cast to float32 leaves: a half operand beside it ends its reach."""
        return KEPT if self.lows else PINNED

    # Predicates

    def is_from_outside(self) -> bool:
        return self.kinds <= {Kind.NEUTRAL}

    def is_traced_in_half(self) -> bool:
        dtypes = map(castable_dtype, self.eqn.invars)
        return all(dtype is None or dtype in _tree.HALF for dtype in dtypes)

    def reads_pinned(self) -> bool:
        return Kind.PINNED in self.kinds

    def uses_gradient(self) -> bool:
        return Kind.GRADIENT in self.kinds and not self._in_backward

    def reads_kept(self) -> bool:
        return Kind.KEPT in self.kinds

    def mixes_halves(self) -> bool:
        return len({s.dtype for s in self.lows}) > 1

    def reads_island(self) -> bool:
        return Kind.FULL in self.kinds

    def is_wanted(self) -> bool:
        """Whether a matmul reads the result; a comparison follows what it compares."""
        if any(map(castable_dtype, self.eqn.outvars)):
            return any(v in self._wants.values for v in self.eqn.outvars)
        return Kind.FULL not in self.kinds and Kind.NEUTRAL not in self.kinds

    def picks_rounded(self) -> bool:
        is_rounded = self.eqn.outvars[0] in self._wants.rounded
        return self.reads_island() and is_rounded and selects(self.eqn)

    def is_saved_by_name(self) -> bool:
        is_barrier = self.eqn.primitive.name in _BARRIERS
        return self.reads_island() and is_barrier and self.is_wanted()

    def leaves_island(self) -> bool:
        meets_low = bool(self.lows) and self.reads_island() and self.is_wanted()
        return meets_low and not self._joins_island()

    def _joins_island(self) -> bool:
        is_gate = self.eqn.primitive.name in _GATES
        return is_gate or self._islands.covers(self.eqn, self._states)


class Case(NamedTuple):
    """A line of the table: when it applies, the state that is taken, and why."""

    applies: Callable[[Follower], bool]
    state: Callable[[Follower], State]
    reason: str


def _neutral(_: Follower) -> State:
    return NEUTRAL


def _full(_: Follower) -> State:
    return FULL


def _kept(_: Follower) -> State:
    return KEPT


CASES = (
    # Weights and constants are cast where a matmul reads them, and not before.
    Case(Follower.is_from_outside, _neutral, "float32 from outside"),
    # The program was written in half here: it stays as it was written.
    Case(Follower.is_traced_in_half, Follower.in_half, "traced in half"),
    # `x.astype(jnp.float32)` is meant, for all that is computed from it elementwise.
    Case(
        Follower.reads_pinned,
        Follower.pinned,
        "follows a cast to float32 by the program",
    ),
    # Outside a backward pass a gradient meets a parameter: that is an update.
    Case(
        Follower.uses_gradient,
        _kept,
        "a gradient is used: updates are made in float32",
    ),
    Case(Follower.reads_kept, _kept, "follows an update that is made in float32"),
    # bfloat16 and float16 have no common half dtype.
    Case(Follower.mixes_halves, _full, "operands of two half dtypes"),
    # `relu` of a float32 value that is rounded next may as well be of the rounded one.
    Case(Follower.picks_rounded, Follower.low, "picks numbers that are rounded next"),
    Case(Follower.is_saved_by_name, Follower.low, "handed back in half under its name"),
    # A residual stream that meets what a norm or a softmax returned takes it in half.
    Case(
        Follower.leaves_island,
        Follower.low,
        "meets a low value outside the float32 island",
    ),
    # `x - mean(x)`: the low value beside the island's result has fed the island.
    Case(Follower.reads_island, _full, "continues a float32 island"),
    Case(Follower.is_wanted, Follower.low, "follows its low operands"),
    # After the last matmul float32 costs nothing: the next reader is float32 anyway.
    Case(lambda _: True, _full, "no matmul reads the result in half"),
)
"""The first case that applies decides."""


def choose(follower: Follower) -> Choice:
    """The state that an operation takes from its neighbours."""
    case = next(case for case in CASES if case.applies(follower))
    return Choice(case.state(follower), case.reason)
