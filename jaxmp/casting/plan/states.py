"""What a plan knows about a value: its dtype, and where that dtype came from."""

import enum
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.types import Atom

FLOAT32 = _tree.FLOAT32
FLOAT16 = jnp.dtype(jnp.float16)


class Kind(enum.Enum):
    """Where the dtype of a value came from."""

    NEUTRAL = "neutral"
    """float32 from outside: a parameter, an input, a constant, a random draw. It is
    cast where it is used, as often as it is used, so that its gradient is summed in
    float32."""
    LOW = "low"
    """The compute dtype, or a half dtype that the program was written with."""
    GRADIENT = "gradient"
    """Low, and made by a backward pass inside the function."""
    FULL = "full"
    """Result of a float32 island; handed back in half where half is wanted."""
    PINNED = "pinned"
    """Cast to float32 by the program: what reads it directly, or through layout and
    elementwise operations, is float32 too."""
    KEPT = "kept"
    """What a gradient or a cast to float32 was added to: elementwise operations and the
    carries of loops keep it in float32, matmuls read it in half."""
    WEIGHT = "weight"
    """From outside, and half where the program goes on with it: it is kept as it came,
    and each reader casts it, so that its gradient can be summed in float32. Only for a
    policy that reduces in float32."""


class State(NamedTuple):
    """Kind and dtype of a floating value; other values have the state None."""

    kind: Kind
    dtype: np.dtype

    @property
    def is_low(self) -> bool:
        """Whether it is in a half dtype."""
        return self.kind in (Kind.LOW, Kind.GRADIENT)


NEUTRAL = State(Kind.NEUTRAL, FLOAT32)
FULL = State(Kind.FULL, FLOAT32)
PINNED = State(Kind.PINNED, FLOAT32)
KEPT = State(Kind.KEPT, FLOAT32)


def low(dtype: np.dtype) -> State:
    """The state of a value that is in a half dtype."""
    return State(Kind.LOW, dtype)


def traced_state(atom: Atom) -> State | None:
    """The state of a value in the dtype it was traced with."""
    dtype = castable_dtype(atom)
    if dtype is None:
        return None
    return low(dtype) if dtype in _tree.HALF else NEUTRAL


def weight(dtype: np.dtype) -> State:
    """The state of a value that is read in half, and kept in a dtype."""
    return State(Kind.WEIGHT, dtype)


def as_read(atom: Atom, state: State | None) -> State | None:
    """The state in which most operations find a value: a weight is half for them."""
    if state is None or state.kind is not Kind.WEIGHT:
        return state
    return traced_state(atom)


def join(states: Iterable[State | None], wanted: bool) -> State | None:
    """The one state that the branches of a conditional agree on for an output."""
    known = [s for s in states if s is not None]
    if not known:
        return None
    kinds = {s.kind for s in known}
    lows = {s.dtype for s in known if s.is_low}
    if Kind.PINNED in kinds:
        return PINNED
    if Kind.KEPT in kinds:
        return KEPT
    if len(lows) > 1:
        return FULL
    if lows and (len(lows) == len(kinds) or wanted):
        return next(s for s in known if s.is_low)
    return FULL if Kind.FULL in kinds or lows else NEUTRAL
