"""Plans jaxprs, each of them once for the same question."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmp._jaxpr.marks import has_half_gradients, quantize_mark, scopes
from jaxmp._jaxpr.scopes import is_backward
from jaxmp._jaxpr.types import Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.plan.plan import Context, JaxprPlan, Settings
from jaxmp.casting.plan.states import State, low
from jaxmp.casting.planner._call_contents import CallContents
from jaxmp.casting.planner._forward import ForwardPass
from jaxmp.casting.planner._interface import Wants
from jaxmp.casting.planner._user_decisions import UserDecisions
from jaxmp.casting.planner._wants import find_wants
from jaxmp.casting.quantized._roles import MatmulRoles
from jaxmp.casting.sums._sums import is_sum, updates


class JaxprPlanner:
    """The planner: two passes over each jaxpr, backward and forward."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.low = low(settings.compute_dtype)
        self.contents = CallContents(has_rules=bool(settings.rules))
        self.user = UserDecisions(settings.rules, self.contents, settings.as_written)
        self.weight_gradients: frozenset[int] = frozenset()
        self.matmuls: Mapping[int, MatmulRoles] = {}
        self.half_blocks: frozenset[str] = frozenset()
        # Keyed by id; `_alive` keeps the jaxprs from being collected meanwhile.
        self._plans: dict[Any, JaxprPlan] = {}
        self._wants: dict[Any, Wants] = {}
        self._updates: dict[Any, frozenset[int]] = {}
        self._alive: list[Jaxpr] = []

    def wants(self, jaxpr: Jaxpr, out_wants: Sequence[bool], context: Context) -> Wants:
        """Which values of a jaxpr are wanted low; see `Planner`."""
        jaxpr = open_jaxpr(jaxpr)
        key = (id(jaxpr), tuple(out_wants), context)
        if key not in self._wants:
            self._alive.append(jaxpr)
            self._wants[key] = find_wants(jaxpr, key[1], context, self)
        return self._wants[key]

    def updates(
        self, jaxpr: Jaxpr, index: int, out: int, length: int | None, context: Context
    ) -> frozenset[int]:
        """What updates the carry of a loop as a sum; see `Planner`."""
        jaxpr = open_jaxpr(jaxpr)
        key = (id(jaxpr), index, out, length, context.in_backward)
        if key not in self._updates:
            self._alive.append(jaxpr)
            found = updates(jaxpr, index, out) if is_sum(jaxpr, *key[1:]) else ()
            self._updates[key] = frozenset(found)
        return self._updates[key]

    def plan(
        self,
        jaxpr: Jaxpr,
        in_states: Sequence[State | None],
        out_wants: Sequence[bool],
        context: Context = Context(),  # noqa: B008
        consts: Sequence[Any] = (),
    ) -> JaxprPlan:
        """Plans a jaxpr; see `Planner`."""
        jaxpr = open_jaxpr(jaxpr)
        key = (id(jaxpr), tuple(in_states), tuple(out_wants), context)
        if key not in self._plans:
            self._alive.append(jaxpr)
            wants = self.wants(jaxpr, key[2], context)
            forward = ForwardPass(self, jaxpr, key[1], wants, context, consts)
            self._plans[key] = forward.plan(key[2])
        return self._plans[key]

    def inside(self, eqn: Eqn, context: Context) -> Context:
        """The context of the bodies of a call."""
        around = context.scopes
        if self.settings.rules or self.half_blocks:
            around = (*around, *scopes(eqn))
        in_backward = context.in_backward or is_backward(eqn)
        half = context.half_gradients
        if self.settings.wide_gradients:
            half = has_half_gradients(eqn, half)
        return context._replace(
            scopes=around,
            in_backward=in_backward,
            half_gradients=half,
            quantize=quantize_mark(eqn, context.quantize),
        )
