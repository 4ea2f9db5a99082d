"""The plan: which value of a jaxpr gets which dtype, and why.

A plan is a pure function of a jaxpr, the states of its inputs, what its outputs are
wanted for, and the rules. It is made in two passes over the equations.

1. **Backward**, `Planner.wants`: a value is *wanted low* if it reaches a matmul through
   operations that follow their operands, without a float32 operation between. The
   residual stream is; attention scores, which only a softmax reads, are not; nor is
   anything after the last matmul.
2. **Forward**, `Planner.plan`: every equation gets one dtype for its floating operands.
   Matmuls take the compute dtype, the operations of the float32 list take float32. The
   others follow:

   - only float32 from outside (parameters, constants, random draws): float32;
   - low operands: low if the result is wanted low, else float32, at no cost, since the
     next reader is float32 or there is none;
   - the result of a float32 island: float32, and part of the island, unless it meets a
     low value that did not feed that island. `x - mean(x)` stays in the island of the
     mean; the sum with a residual stream does not, and takes the result in half.

Calls (`jit`, `scan`, `cond`, ...) are planned by `jaxmp.casting.rules`, by planning
their bodies in the same two passes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmp import _tree
from jaxmp._jax_internals import open_jaxpr
from jaxmp.casting import _registry, _rules
from jaxmp.casting._constants import Constants
from jaxmp.casting._op_lists import OpClass
from jaxmp.casting._states import (
    FLOAT32,
    FULL,
    NEUTRAL,
    PINNED,
    Kind,
    State,
    castable_dtype,
    is_literal,
    low,
    traced_state,
)

FULL_PRECISION_SCOPE = "jaxmp.full_precision"
AUTOCAST_SCOPE = "jaxmp.autocast"
# Products and quotients with an island's result are gates and normalisations; sums
# with it are residual streams.
_GATES = frozenset(("mul", "div"))
_MATMULS = frozenset(("dot_general", "ragged_dot_general", "conv_general_dilated"))


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
    """

    eqn: Any
    op_class: OpClass
    reason: str
    in_dtypes: tuple[np.dtype | None, ...]
    out_states: tuple[State | None, ...]
    in_island: bool = False
    params: dict[str, Any] | None = None
    call: Any = None
    rule: _rules.OpRule | None = None


@dataclasses.dataclass(slots=True, eq=False)
class JaxprPlan:
    """The plan of a jaxpr: one `EqnPlan` per equation, and how to run them.

    Attributes:
      jaxpr: the jaxpr that was planned.
      in_states, out_states: of its inputs and outputs.
      eqns: the plans of its equations, in order.
      steps: what to run, in order; see `_islands`.
      cache: rebuilt jaxprs of the executor, which belong to this plan.
    """

    jaxpr: Any
    in_states: tuple[State | None, ...]
    out_states: tuple[State | None, ...]
    eqns: list[EqnPlan]
    steps: Sequence[Any]
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)


class Context(NamedTuple):
    """What the equations of a body inherit from the call around it."""

    scopes: tuple[str, ...] = ()
    in_backward: bool = False


class Settings(NamedTuple):
    """What a plan depends on, besides the jaxpr."""

    compute_dtype: np.dtype
    matmul_precision: Any = None
    rules: tuple[_rules.OpRule, ...] = ()
    recompute: bool = True


class Planner:
    """Plans jaxprs under one setting, each of them once."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.low = low(settings.compute_dtype)
        self.used_rules: set[_rules.OpRule] = set()
        # Keyed by id; `_alive` keeps the jaxprs from being collected meanwhile.
        self._plans: dict[Any, JaxprPlan] = {}
        self._wants: dict[Any, tuple[tuple[bool, ...], frozenset[Any]]] = {}
        self._contents: dict[int, Contents] = {}
        self._alive: list[Any] = []

    # Backward

    def wants(
        self, jaxpr: Any, out_wants: Sequence[bool], context: Context
    ) -> tuple[bool, ...]:
        """Tells which inputs of a jaxpr are wanted low, given which outputs are."""
        return self._analyse(jaxpr, tuple(out_wants), context)[0]

    def _analyse(self, jaxpr, out_wants, context):
        jaxpr = open_jaxpr(jaxpr)
        key = (id(jaxpr), out_wants, self._relevant(context))
        if key in self._wants:
            return self._wants[key]
        wanted = {
            v
            for v, want in zip(jaxpr.outvars, out_wants, strict=True)
            if want and not is_literal(v)
        }
        for eqn in reversed(jaxpr.eqns):
            results = [v in wanted for v in eqn.outvars]
            for v, want in zip(
                eqn.invars, self._eqn_wants(eqn, results, context), strict=True
            ):
                if want and not is_literal(v):
                    wanted.add(v)
        self._alive.append(jaxpr)
        answer = tuple(v in wanted for v in jaxpr.invars), frozenset(wanted)
        self._wants[key] = answer
        return answer

    def _eqn_wants(self, eqn, results, context) -> Iterable[bool]:
        nothing = (False,) * len(eqn.invars)
        if not any(castable_dtype(v) for v in eqn.invars):
            return nothing
        name = eqn.primitive.name
        call = _registry.call_rule(name)
        decided = self._decided(eqn, context)
        if decided is not None:
            is_low = decided.dtype in _tree.HALF
            return tuple(is_low and castable_dtype(v) is not None for v in eqn.invars)
        if call is not None:
            return call.wants(eqn, results, self, self._inside(eqn, context))
        if name == "convert_element_type":
            to_half = eqn.params["new_dtype"] in _tree.HALF
            return (to_half or (results[0] and castable_dtype(eqn.invars[0])),)
        entry = _registry.entry(name)
        if entry.op_class is OpClass.COMPUTE:
            is_kept = self._matmul_intent(eqn) is not None
            return tuple(not is_kept and castable_dtype(v) for v in eqn.invars)
        if entry.op_class is OpClass.FOLLOW and any(results):
            return tuple(castable_dtype(v) is not None for v in eqn.invars)
        return nothing

    # Forward

    def plan(
        self,
        jaxpr: Any,
        in_states: Sequence[State | None],
        out_wants: Sequence[bool],
        context: Context = Context(),  # noqa: B008
        consts: Sequence[Any] = (),
    ) -> JaxprPlan:
        """Plans a jaxpr.

        Args:
          jaxpr: with or without its constants.
          in_states: the state of each input.
          out_wants: whether each output is wanted low.
          context: inherited from the call that it is the body of.
          consts: values of its `constvars`, for those that float16 cannot hold.
        """
        jaxpr = open_jaxpr(jaxpr)
        in_states, out_wants = tuple(in_states), tuple(out_wants)
        key = (id(jaxpr), in_states, out_wants, self._relevant(context))
        if key not in self._plans:
            self._alive.append(jaxpr)
            wanted = self._analyse(jaxpr, out_wants, context)[1]
            painter = _Painter(self, jaxpr, in_states, wanted, context, consts)
            self._plans[key] = painter.paint(out_wants)
        return self._plans[key]

    def contents(self, jaxpr: Any) -> "Contents":
        """Summarises what the equations of a jaxpr are, bodies of calls included."""
        jaxpr = open_jaxpr(jaxpr)
        if id(jaxpr) not in self._contents:
            self._alive.append(jaxpr)
            self._contents[id(jaxpr)] = _contents(self, jaxpr)
        return self._contents[id(jaxpr)]

    # Decisions that need no states

    def _decided(self, eqn, context) -> "_Decision | None":
        """What the user decided about an equation, wherever it stands."""
        names = [getattr(part, "name", "") for part in eqn.source_info.name_stack.stack]
        if FULL_PRECISION_SCOPE in names:
            return _Decision(FLOAT32, "full_precision", None)
        if AUTOCAST_SCOPE in names:
            return _Decision(None, "decided by the autocast inside", None)
        if not self.settings.rules:
            return None
        scopes = context.scopes + _scopes(eqn)
        name = eqn.primitive.name
        for rule in self.settings.rules:
            if _rules.matches(rule, name, scopes, eqn):
                self.used_rules.add(rule)
                return _Decision(rule.compute, f"rule {_show(rule)}", rule)
        return None

    def _matmul_intent(self, eqn) -> str | None:
        """Why a matmul keeps the dtypes it was traced with, or None."""
        traced = [d for d in map(castable_dtype, eqn.invars) if d is not None]
        result = castable_dtype(eqn.outvars[0])
        if result is None or len(traced) < 2:
            return "no float32 matmul"
        if any(dtype in _tree.HALF for dtype in traced):
            if result == FLOAT32 and all(dtype in _tree.HALF for dtype in traced):
                return "a float32 result was asked of half operands"
            return "traced in half"
        precision = eqn.params.get("precision")
        for part in precision if isinstance(precision, tuple) else (precision,):
            if part is not None and part not in _LOWERABLE:
                return f"precision={part}"
        return None

    def _inside(self, eqn, context: Context) -> Context:
        """The context of the bodies of a call."""
        scopes = context.scopes
        if self.settings.rules:
            scopes = (*scopes, *_scopes(eqn))
            if eqn.primitive.name == "jit":
                scopes = scopes
        return Context(scopes, context.in_backward or _is_backward(eqn))

    def _relevant(self, context: Context) -> Context:
        return context if self.settings.rules else context._replace(scopes=())


_LOWERABLE = (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH)


class _Decision(NamedTuple):
    dtype: np.dtype | None
    reason: str
    rule: _rules.OpRule | None


class Contents(NamedTuple):
    """What the equations of a jaxpr are, those of the bodies of its calls included."""

    has_float: bool = False
    has_matmul: bool = False
    has_full: bool = False
    is_simple: bool = True
    """No loop, no effect, no half dtype, no rule and no unknown primitive: in float32
    it can be bound whole, and computed again where that saves memory."""


def _contents(planner: Planner, jaxpr: Any) -> Contents:
    has_float = any(map(castable_dtype, [*jaxpr.invars, *jaxpr.outvars]))
    has_matmul = has_full = False
    is_simple = not planner.settings.rules and not jaxpr.effects
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        dtypes = [castable_dtype(v) for v in (*eqn.invars, *eqn.outvars)]
        call = _registry.call_rule(name)
        has_float = has_float or any(dtypes)
        names = [getattr(part, "name", "") for part in eqn.source_info.name_stack.stack]
        if any(dtype in _tree.HALF for dtype in dtypes) or AUTOCAST_SCOPE in names:
            is_simple = False
        if call is not None:
            inner = [planner.contents(body) for body in call.bodies(eqn)]
            has_float = has_float or any(c.has_float for c in inner)
            has_matmul = has_matmul or any(c.has_matmul for c in inner)
            has_full = has_full or any(c.has_full for c in inner)
            if call.is_loop or not all(c.is_simple for c in inner):
                is_simple = is_simple and not any(c.has_float for c in inner)
            has_full = has_full or (call.is_loop and any(c.has_float for c in inner))
            continue
        entry = _registry.entry(name)
        if FULL_PRECISION_SCOPE in names:
            has_full = True
        elif entry.op_class is OpClass.COMPUTE:
            has_matmul = has_matmul or any(dtypes)
        elif entry.op_class is OpClass.FULL:
            has_full = has_full or any(dtypes)
        is_simple = is_simple and _registry.is_cheap(name)
    return Contents(has_float, has_matmul, has_full, is_simple)


class _Painter:
    """One forward pass over the equations of one jaxpr."""

    def __init__(self, planner, jaxpr, in_states, wanted, context, consts):
        self.planner = planner
        self.jaxpr = jaxpr
        self.in_states = in_states
        self.wanted = wanted
        self.context = context
        self.states: dict[Any, State | None] = dict(
            zip(jaxpr.invars, in_states, strict=True)
        )
        self.states.update((v, traced_state(v)) for v in jaxpr.constvars)
        self.constants = Constants(planner.settings.compute_dtype, jaxpr, consts)
        self.feeds = _Feeds()

    def paint(self, out_wants: tuple[bool, ...]) -> JaxprPlan:
        eqns = []
        for eqn in self.jaxpr.eqns:
            plan = self.paint_eqn(eqn)
            self.states.update(zip(eqn.outvars, plan.out_states, strict=True))
            eqns.append(plan)
        out_states = [
            self.output_state(v, want)
            for v, want in zip(self.jaxpr.outvars, out_wants, strict=True)
        ]
        from jaxmp.casting._islands import schedule

        steps = schedule(eqns, self.jaxpr, out_states, self.planner.settings.recompute)
        return JaxprPlan(
            self.jaxpr, tuple(self.in_states), tuple(out_states), eqns, steps
        )

    def output_state(self, atom: Any, want: bool) -> State | None:
        state = self.state(atom)
        if want and state is not None and state.kind is Kind.FULL:
            return self.planner.low
        return state

    def state(self, atom: Any) -> State | None:
        return traced_state(atom) if is_literal(atom) else self.states[atom]

    def paint_eqn(self, eqn: Any) -> EqnPlan:
        name = eqn.primitive.name
        states = [self.state(v) for v in eqn.invars]
        if not any(states) and not any(map(castable_dtype, eqn.outvars)):
            call = _registry.call_rule(name)
            inner = () if call is None else call.bodies(eqn)
            if not any(self.planner.contents(body).has_float for body in inner):
                return self.untouched(eqn, states, "no floating operand")
        decided = self.planner._decided(eqn, self.context)
        call = _registry.call_rule(name)
        if decided is not None and (call is None or decided.dtype in (FLOAT32, None)):
            return self.decided(eqn, states, decided)
        if call is not None:
            plan = self.composite(eqn, states, call)
            if plan is not None:
                return plan
            inside = self.planner._inside(eqn, self.context)
            wants = tuple(v in self.wanted for v in eqn.outvars)
            return call.plan(eqn, states, wants, self.planner, inside)
        return self.operation(eqn, states)

    def operation(self, eqn: Any, states: list[State | None]) -> EqnPlan:
        """Plans an equation that is no call."""
        if eqn.primitive.name == "convert_element_type":
            return self.cast(eqn, states)
        entry = _registry.entry(eqn.primitive.name)
        if entry.op_class is OpClass.COMPUTE:
            intent = self.planner._matmul_intent(eqn)
            if intent is None and any(
                s is not None and s.kind is Kind.PINNED for s in states
            ):
                intent = "an operand was cast to float32"
            if intent is None:
                return self.compute(eqn, entry.reason)
            plan = self.untouched(eqn, states, intent)
            pinned = [
                PINNED if s is not None and not s.is_low else s for s in plan.out_states
            ]
            return dataclasses.replace(
                plan,
                out_states=tuple(pinned),
                params=self.with_precision(eqn, eqn.params),
            )
        if entry.op_class is OpClass.FULL:
            return self.full(eqn, states, entry.reason)
        if entry.op_class is OpClass.FOLLOW:
            return self.follow(eqn, states, self.chosen(eqn, states))
        return self.untouched(eqn, states, entry.reason)

    # One method per outcome

    def untouched(self, eqn, states, reason) -> EqnPlan:
        outs = tuple(traced_state(v) for v in eqn.outvars)
        dtypes = tuple(map(castable_dtype, eqn.invars))
        return EqnPlan(eqn, OpClass.UNTOUCHED, reason, dtypes, outs)

    def compute(self, eqn, reason, dtype=None) -> EqnPlan:
        dtype = dtype or self.planner.settings.compute_dtype
        bad = self.constants.unfit(eqn.invars, dtype)
        if bad is not None:
            states = [self.state(v) for v in eqn.invars]
            return self.full(eqn, states, bad)
        if dtype == FLOAT32:
            params = self.with_precision(eqn, eqn.params)
            in_dtypes = tuple(castable_dtype(v) and FLOAT32 for v in eqn.invars)
            outs = tuple(castable_dtype(v) and NEUTRAL for v in eqn.outvars)
            return EqnPlan(eqn, OpClass.COMPUTE, reason, in_dtypes, outs, params=params)
        backward = self.context.in_backward or _is_backward(eqn)
        state = State(Kind.GRADIENT if backward else Kind.LOW, dtype)
        return self.at(eqn, state, OpClass.COMPUTE, reason)

    def at(self, eqn, state: State, op_class, reason) -> EqnPlan:
        """Operands and results in one half dtype."""
        in_dtypes = tuple(castable_dtype(v) and state.dtype for v in eqn.invars)
        outs = tuple(castable_dtype(v) and state for v in eqn.outvars)
        params = _registry.params_at(eqn.primitive.name, eqn.params, state.dtype)
        return EqnPlan(eqn, op_class, reason, in_dtypes, outs, params=params)

    def full(self, eqn, states, reason, out: State | None = None) -> EqnPlan:
        """Operands in float32, as part of an island unless all come from outside."""
        is_active = any(
            s is not None and s.kind is not Kind.NEUTRAL and not is_literal(v)
            for v, s in zip(eqn.invars, states, strict=True)
        )
        state = out or (FULL if is_active else NEUTRAL)
        outs = tuple(
            None if dtype is None else low(dtype) if dtype in _tree.HALF else state
            for dtype in map(castable_dtype, eqn.outvars)
        )
        in_dtypes = tuple(castable_dtype(v) and FLOAT32 for v in eqn.invars)
        in_island = is_active and not eqn.effects and self.is_cheap(eqn)
        if in_island:
            self.feeds.add(eqn, states)
        return EqnPlan(eqn, OpClass.FULL, reason, in_dtypes, outs, in_island)

    def is_cheap(self, eqn) -> bool:
        call = _registry.call_rule(eqn.primitive.name)
        if call is None:
            return _registry.is_cheap(eqn.primitive.name)
        return not call.is_loop and all(
            self.planner.contents(body).is_simple for body in call.bodies(eqn)
        )

    def follow(self, eqn, states, choice: "_Choice") -> EqnPlan:
        state, reason = choice
        if state.is_low:
            plan = self.at(eqn, state, OpClass.FOLLOW, reason)
            self.feeds.moved(eqn)
        elif state.kind is Kind.NEUTRAL:
            plan = self.full(eqn, [None] * len(states), reason)
            self.constants.carry(eqn)
        else:
            plan = self.full(eqn, states, reason, state)
        return dataclasses.replace(plan, op_class=OpClass.FOLLOW)

    def cast(self, eqn, states) -> EqnPlan:
        """A cast that changes a dtype means it; one that does not is no operation."""
        source, target = states[0], eqn.params["new_dtype"]
        traced = castable_dtype(eqn.invars[0])
        if traced is None or target not in _tree.CASTABLE:
            return self.untouched(eqn, states, "cast from or to what is no float")
        if traced == target:
            choice = self.chosen(eqn, states)
            if choice.state.is_low:
                return self.follow(eqn, states, choice)
            plan = self.follow(eqn, states, choice)
            return plan
        if target in _tree.HALF:
            state = State(Kind.LOW, target)
            return EqnPlan(
                eqn, OpClass.UNTOUCHED, f"cast to {target}", (None,), (state,)
            )
        if source is None or not source.is_low:
            return self.untouched(eqn, states, "cast to float32")
        return self.full(eqn, states, "cast to float32 by the program", PINNED)

    def decided(self, eqn, states, decision: _Decision) -> EqnPlan:
        if decision.dtype is None:
            plan = self.untouched(eqn, states, decision.reason)
            outs = tuple(
                PINNED if s is not None and not s.is_low else s for s in plan.out_states
            )
            return dataclasses.replace(plan, out_states=outs)
        entry = _registry.entry(eqn.primitive.name)
        if decision.dtype == FLOAT32:
            plan = self.full(eqn, states, decision.reason)
        elif entry.op_class is OpClass.UNTOUCHED:
            plan = self.operation(eqn, states)
        else:
            plan = self.compute(eqn, decision.reason, decision.dtype)
        return dataclasses.replace(plan, rule=decision.rule)

    def composite(self, eqn, states, call) -> EqnPlan | None:
        """A call without a matmul in it is planned like one operation."""
        contents = [self.planner.contents(body) for body in call.bodies(eqn)]
        is_simple = all(c.is_simple for c in contents)
        if not call.is_composite or any(c.has_matmul for c in contents):
            return None
        if not is_simple:
            if not (call.is_loop and self._loop_is_whole(eqn, contents)):
                return None
            return self.full(eqn, states, "a loop without a matmul in it")
        if any(c.has_full for c in contents) or call.is_loop:
            return self.full(eqn, states, "a call of float32 operations")
        choice = self.chosen(eqn, states)
        if choice.state.is_low:
            return None
        return self.follow(eqn, states, choice)

    def _loop_is_whole(self, eqn, contents) -> bool:
        return not self.planner.settings.rules and not eqn.effects

    def with_precision(self, eqn, params) -> dict[str, Any] | None:
        """Puts the policy's algorithm into a matmul that stays in float32."""
        precision = self.planner.settings.matmul_precision
        if precision is None or params.get("precision") is not None:
            return None
        if eqn.primitive.name not in _MATMULS:
            return None
        if castable_dtype(eqn.outvars[0]) != FLOAT32:
            return None
        if isinstance(precision, jax.lax.Precision):
            return {**params, "precision": (precision, precision)}
        if eqn.primitive.name != "dot_general":
            return None
        return {**params, "precision": precision}

    # What an operation follows

    def chosen(self, eqn, states) -> "_Choice":
        choice = self.by_neighbours(eqn, states)
        if choice.state.is_low:
            bad = self.constants.unfit(eqn.invars, choice.state.dtype)
            if bad is not None:
                return _Choice(FULL, bad)
        return choice

    def by_neighbours(self, eqn, states) -> "_Choice":
        known = [
            s
            for v, s in zip(eqn.invars, states, strict=True)
            if s is not None and not is_literal(v)
        ]
        kinds = {s.kind for s in known}
        lows = [s for s in known if s.is_low]
        if kinds <= {Kind.NEUTRAL}:
            return self.of_neutral(eqn)
        if all(castable_dtype(v) in (None, *_tree.HALF) for v in eqn.invars):
            dtype = lows[0].dtype if lows else self.planner.settings.compute_dtype
            return _Choice(State(Kind.LOW, dtype), "traced in half")
        if Kind.PINNED in kinds:
            return _Choice(PINNED, "follows a cast to float32 by the program")
        in_backward = self.context.in_backward or _is_backward(eqn)
        if Kind.GRADIENT in kinds and not in_backward:
            return _Choice(PINNED, "a gradient is used: updates are made in float32")
        if len({s.dtype for s in lows}) > 1:
            return _Choice(FULL, "operands of two half dtypes")
        state = lows[0] if lows else self.planner.low
        if Kind.GRADIENT in kinds:
            state = State(Kind.GRADIENT, state.dtype)
        wanted = any(v in self.wanted for v in eqn.outvars)
        if not any(map(castable_dtype, eqn.outvars)):
            wanted = Kind.FULL not in kinds and Kind.NEUTRAL not in kinds
        if Kind.FULL in kinds:
            if wanted and lows and not self.joins_island(eqn, states):
                return _Choice(state, "meets a low value outside the float32 island")
            return _Choice(FULL, "continues a float32 island")
        if wanted:
            return _Choice(state, "follows its low operands")
        return _Choice(FULL, "no matmul reads the result in half")

    def of_neutral(self, eqn) -> "_Choice":
        # A row looked up in a table of parameters is an activation.
        is_lookup = eqn.primitive.name == "gather" and eqn.outvars[0] in self.wanted
        if is_lookup and not self.constants.is_constant(eqn.invars[0]):
            return _Choice(NEUTRAL, "a lookup in a float32 table")
        return _Choice(NEUTRAL, "float32 from outside")

    def joins_island(self, eqn, states) -> bool:
        return eqn.primitive.name in _GATES or self.feeds.covers(eqn, states)


class _Choice(NamedTuple):
    state: State
    reason: str


class _Feeds:
    """Which low values feed which float32 island, while the islands grow."""

    def __init__(self):
        self.parent: dict[Any, Any] = {}
        self.inputs: dict[Any, set[Any]] = {}
        self.source: dict[Any, Any] = {}

    def find(self, v):
        while self.parent[v] is not v:
            self.parent[v] = v = self.parent[self.parent[v]]
        return v

    def origin(self, v):
        return self.source.get(v, v)

    def add(self, eqn, states) -> None:
        """An equation joins the islands of its operands."""
        roots = {self.find(v) for v in _variables(eqn) if v in self.parent}
        low_inputs = {
            self.origin(v)
            for v, s in zip(eqn.invars, states, strict=True)
            if s is not None and s.is_low and not is_literal(v)
        }
        root = max(roots, key=lambda r: len(self.inputs[r]), default=eqn.outvars[0])
        self.parent.setdefault(root, root)
        inputs = self.inputs.setdefault(root, set())
        inputs |= low_inputs
        for other in roots - {root}:
            self.parent[other] = root
            inputs |= self.inputs.pop(other)
        for v in eqn.outvars:
            self.parent[v] = root

    def moved(self, eqn) -> None:
        """A low value that was only reshaped or moved is still the same value."""
        if eqn.primitive.name in _registry.LAYOUT and not is_literal(eqn.invars[0]):
            self.source[eqn.outvars[0]] = self.origin(eqn.invars[0])

    def covers(self, eqn, states) -> bool:
        roots = {self.find(v) for v in _variables(eqn) if v in self.parent}
        fed = set().union(*(self.inputs[root] for root in roots))
        return all(
            self.origin(v) in fed
            for v, s in zip(eqn.invars, states, strict=True)
            if s is not None and s.is_low and not is_literal(v)
        )


def _variables(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if not is_literal(v)]


def _scopes(eqn: Any) -> tuple[str, ...]:
    stack = eqn.source_info.name_stack.stack
    names = tuple(p.name for p in stack if type(p).__name__ == "Scope")
    return _rules.normalise(names)


def _is_backward(eqn: Any) -> bool:
    return any(
        type(part).__name__ == "Transform" and part.name == "transpose"
        for part in eqn.source_info.name_stack.stack
    )


def _show(rule: _rules.OpRule) -> str:
    conditions = {
        name: getattr(rule, name)
        for name in ("primitive", "path", "function")
        if getattr(rule, name) is not None
    }
    text = ", ".join(f"{k}={v!r}" for k, v in conditions.items())
    return f"({text})"


Report = Callable[[str], None]
