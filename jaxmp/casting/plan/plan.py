"""The plan: which value of a jaxpr gets which dtype, and why.

A plan is a pure function of a jaxpr, the states of its inputs, what its outputs are
wanted for, and the rules. `jaxmp.casting.planner` makes it in two passes over the
equations.

1. **Backward**, `find_wants`: a value is *wanted low* if it reaches a matmul through
   operations that follow their operands, without a float32 operation between. The
   residual stream is; attention scores, which only a softmax reads, are not; nor is
   anything after the last matmul.
2. **Forward**, `ForwardPass`: every equation gets one dtype for its floating operands.
   Matmuls take the compute dtype, the operations of the float32 list take float32. The
   others follow their neighbours, by the table in `planner/_following.py`:

   - only float32 from outside (parameters, constants, random draws): float32;
   - low operands: low if the result is wanted low, else float32, which costs nothing
     there: its readers are float32 too;
   - the result of a float32 island: float32. `x - mean(x)` and a norm's scale stay in
     the island; adding to a residual stream leaves it.

Calls (`jit`, `scan`, `cond`, ...) are planned by `jaxmp.casting.rules`, by planning
their bodies in the same two passes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmp._jaxpr.atoms import castable_dtype
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.ops._user_rules import OpRule
from jaxmp.casting.plan.states import FLOAT32, FULL, NEUTRAL, State, traced_state
from jaxmp.quantization.recipe import Recipe, Role

LAYER_REASON = "a layer of Flax, decided by its policy"
SPECIAL_FUNCTION = "part of a special function or a density of JAX"


class Quantizing(NamedTuple):
    """What is decided about a matmul in half that might be in a smaller format.

    Attributes:
      recipe: how it is multiplied; None leaves it in half.
      roles: what its operands are.
      reason: why, for people.
    """

    recipe: Recipe | None
    roles: tuple[Role, Role]
    reason: str


@dataclasses.dataclass(slots=True)
class EqnPlan:
    """What is decided about one equation.

    Attributes:
      eqn: the equation as it was traced.
      op_class: the class that decided.
      reason: why, for people.
      in_dtypes: what each operand is cast to; None leaves it as it is stored.
      out_states: the state of each result.
      in_island: whether it is computed in float32 inside an island.
      params: parameters that replace those of the equation, because they name dtypes.
      call: the plans of the bodies of a call, made and read by its rule.
      rule: the rule that matched, if any.
      weights: which operands of a matmul get their gradient in float32.
      is_lookup: whether it looks rows up in a table, its first operand.
      is_apart: whether its result is a sum to keep apart from others.
      is_wide: whether it makes the gradient of a weight, in float32.
      repeats: which operands it repeats, whose gradients are added up in float32.
      quantizing: of a matmul in half under a policy that quantises; else None.
    """

    eqn: Eqn
    op_class: OpClass
    reason: str
    in_dtypes: tuple[np.dtype | None, ...]
    out_states: tuple[State | None, ...]
    in_island: bool = False
    params: dict[str, Any] | None = None
    call: Any = None
    rule: OpRule | None = None
    weights: tuple[int, ...] = ()
    is_lookup: bool = False
    is_apart: bool = False
    is_wide: bool = False
    repeats: tuple[int, ...] = ()
    quantizing: Quantizing | None = None

    @property
    def recipe(self) -> Recipe | None:
        """How it is multiplied in a smaller format; None if it is not."""
        return self.quantizing and self.quantizing.recipe

    @property
    def is_as_traced(self) -> bool:
        """Whether operands and results have the dtypes they were traced with."""
        return (
            self.params is None
            and self.call is None
            and not (self.in_island or self.weights or self.is_lookup)
            and not (self.is_apart or self.is_wide or self.repeats or self.recipe)
            and self.in_dtypes == tuple(map(castable_dtype, self.eqn.invars))
            and self.out_states == tuple(map(traced_state, self.eqn.outvars))
        )


def bodies_of(call: Any) -> Sequence["JaxprPlan"]:
    """The plans of the bodies of a call, given `EqnPlan.call`."""
    if call is None:
        return ()
    call = getattr(call, "primal", call)
    return call if isinstance(call, tuple) else (call,)


def as_island(plan: EqnPlan) -> EqnPlan:
    """What is bound whole returns ordinary values, none that come from outside."""
    outs = tuple(FULL if s is NEUTRAL else s for s in plan.out_states)
    return dataclasses.replace(plan, out_states=outs)


@dataclasses.dataclass(slots=True, eq=False)
class JaxprPlan:
    """The plan of a jaxpr: one `EqnPlan` per equation, and how to run them.

    Attributes:
      jaxpr: the jaxpr that was planned.
      in_states, out_states: of its inputs and outputs.
      eqns: the plans of its equations, in order.
      steps: what to run, in order: plans of equations, and islands of them.
      cache: rebuilt jaxprs of the executor, which belong to this plan.
    """

    jaxpr: Jaxpr
    in_states: tuple[State | None, ...]
    out_states: tuple[State | None, ...]
    eqns: list[EqnPlan]
    steps: Sequence[Any]
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_as_traced(self) -> bool:
        """Whether the plan changes nothing."""
        return all(plan.is_as_traced for plan in self.eqns)


class Context(NamedTuple):
    """What the equations of a body inherit from the calls around it.

    Attributes:
      scopes: the user's name scopes, if there are rules.
      in_backward: whether it is part of a backward pass.
      updates: ids of the equations that update the sums of the loops around it. Others
        may share such an equation, in a call that JAX traced once.
      half_gradients: whether a layer around asks for the gradients of its weights in
        half, where others get them in float32.
      quantize: the recipe that a layer around asks for; None if none does.
    """

    scopes: tuple[str, ...] = ()
    in_backward: bool = False
    updates: frozenset[int] = frozenset()
    half_gradients: bool = False
    quantize: str | None = None


class Settings(NamedTuple):
    """What a plan depends on, besides the jaxpr.

    `ambient` is the precision parameter that matmuls were to get where it was called.
    `wide_gradients` asks for the gradients of weights in float32; `as_written` leaves
    all else as it was traced, as in a layer of Flax. `quantize` names the recipe of the
    matmuls with weights, and `half_blocks` how many of the first and of the last blocks
    of layers are left in half.
    """

    compute_dtype: np.dtype
    matmul_precision: Any = None
    rules: tuple[OpRule, ...] = ()
    recompute: bool = True
    ambient: Any = None
    wide_gradients: bool = False
    as_written: bool = False
    quantize: str | None = None
    half_blocks: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for: everything stays as it was traced."""
        return (
            self.compute_dtype == FLOAT32
            and self.matmul_precision is None
            and not self.rules
        )


class Decision(NamedTuple):
    """What the user decided about an equation; a dtype of None leaves it as traced."""

    dtype: np.dtype | None
    reason: str
    rule: OpRule | None = None
