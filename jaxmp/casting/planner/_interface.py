"""`Planner`: what the passes, and the rules of calls, ask of a planner."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxmp._jaxpr.types import Eqn, Jaxpr, Var
from jaxmp.casting.plan.plan import Context, JaxprPlan, Settings
from jaxmp.casting.plan.states import State
from jaxmp.casting.planner._call_contents import CallContents
from jaxmp.casting.planner._user_decisions import UserDecisions
from jaxmp.casting.quantized._roles import MatmulRoles


class Wants(NamedTuple):
    """Which values of a jaxpr are wanted low.

    Attributes:
      inputs: for each input whether it is.
      values: all of them.
      rounded: those that are rounded as they are, before arithmetic is done with them.
    """

    inputs: tuple[bool, ...]
    values: frozenset[Var]
    rounded: frozenset[Var]


class Planner(Protocol):
    """Plans jaxprs under one setting, each of them once.

    Attributes:
      settings: what the plans depend on.
      low: the state of a value in the compute dtype.
      contents: what jaxprs are made of.
      user: what the user decided.
      weight_gradients: ids of the matmuls in a backward pass whose results are
        gradients of weights, if these are wanted in float32.
      matmuls: what the operands of matmuls are, by the ids of these, if some are to be
        quantised.
      half_blocks: the paths of the blocks of layers that are left in half.
    """

    settings: Settings
    low: State
    contents: CallContents
    user: UserDecisions
    weight_gradients: frozenset[int]
    matmuls: Mapping[int, MatmulRoles]
    half_blocks: frozenset[str]

    def wants(self, jaxpr: Jaxpr, out_wants: Sequence[bool], context: Context) -> Wants:
        """Which values of a jaxpr are wanted low, given which outputs are."""
        ...

    def updates(
        self, jaxpr: Jaxpr, index: int, out: int, length: int | None, context: Context
    ) -> frozenset[int]:
        """The ids of the equations that update a carry as a sum; none if it is not one.

        Args:
          jaxpr: the body of a loop.
          index: which of its inputs the carry is.
          out: which of its outputs the carry is.
          length: how often the loop runs, if that is known.
          context: of the body.
        """
        ...

    def plan(
        self,
        jaxpr: Jaxpr,
        in_states: Sequence[State | None],
        out_wants: Sequence[bool],
        context: Context = ...,
        consts: Sequence[Any] = ...,
    ) -> JaxprPlan:
        """Plans a jaxpr.

        Args:
          jaxpr: with or without its constants.
          in_states: the state of each input.
          out_wants: whether each output is wanted low.
          context: inherited from the call that it is the body of.
          consts: values of its `constvars`, for those that float16 cannot hold.
        """
        ...

    def inside(self, eqn: Eqn, context: Context) -> Context:
        """The context of the bodies of a call."""
        ...
