"""Follows every value of a program through its calls and loops."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.calls import LOOPS, body, branches, loop, manual_devices
from jaxmp._jaxpr.marks import AUTOCAST_SCOPE, FULL_PRECISION_SCOPE, LAYER_SCOPE
from jaxmp._jaxpr.scopes import scope_names
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.report.audit._origins import Value, constant_value


class Context(NamedTuple):
    """Where an equation stands, and what it inherits from the calls around it.

    Attributes:
      site: its modules, its line and its direction.
      times: how often it runs; the iterations of a `while` are unknown, and count 1.
      devices: on how many devices at once.
      in_autocast: whether autocast decides about its dtypes.
      in_full_precision: whether `full_precision` keeps autocast from it.
      is_settled: False while the carries of a loop around it are being worked out.
    """

    site: Site = Site()
    times: int = 1
    devices: int = 1
    in_autocast: bool = False
    in_full_precision: bool = False
    is_settled: bool = True

    def at(self, eqn: Eqn) -> "Context":
        """The context of an equation, and of the jaxprs that it holds."""
        names = scope_names(eqn)
        return self._replace(
            site=Site(eqn, self.site),
            in_autocast=(self.in_autocast or AUTOCAST_SCOPE in names)
            and LAYER_SCOPE not in names,
            in_full_precision=self.in_full_precision or FULL_PRECISION_SCOPE in names,
        )

    @property
    def runs(self) -> int:
        """How often it runs, on all devices together."""
        return self.times * self.devices

    @property
    def under(self) -> str:
        """What of jaxmp's decides about the dtypes here, or an empty string."""
        if self.in_full_precision:
            return "full_precision"
        if self.in_autocast:
            return "autocast"
        return "apply_policy" if "jaxmp.modules" in self.site.packages else ""


Look: TypeAlias = Callable[[Eqn, Sequence[Value], Context], Sequence[Value]]
"""Takes an equation, what is known about its operands, and its context; returns what
is known about its results."""


class Dataflow:
    """Walks a program.

    Args:
      look: called for every equation that is not a call.
      enter: called with each jaxpr and its context before it is walked.
    """

    def __init__(self, look: Look, enter: Callable[[Jaxpr, Context], None]):
        self.look = look
        self.enter = enter

    def walk(
        self, jaxpr: Jaxpr, inputs: Sequence[Value], context: Context
    ) -> list[Value]:
        """Walks one jaxpr.

        Args:
          jaxpr: with or without its constants.
          inputs: what is known about its inputs.
          context: of the equation that holds it.

        Returns:
          What is known about its outputs.
        """
        self.enter(jaxpr, context)
        opened = open_jaxpr(jaxpr)
        values = {v: constant_value(v) for v in opened.constvars}
        values |= zip(opened.invars, inputs, strict=True)

        def read(atom: Atom) -> Value:
            return constant_value(atom) if is_literal(atom) else values[atom]

        for eqn in opened.eqns:
            outs = self._equation(eqn, [read(v) for v in eqn.invars], context.at(eqn))
            values |= zip(eqn.outvars, outs, strict=True)
        return [read(v) for v in opened.outvars]

    def _equation(
        self, eqn: Eqn, values: list[Value], context: Context
    ) -> Sequence[Value]:
        name = eqn.primitive.name
        if name in LOOPS:
            return self._loop(eqn, values, context)
        if name == "cond":
            outs = [self.walk(way, values[1:], context) for way in branches(eqn)]
            return [_join(ways) for ways in zip(*outs, strict=True)]
        called = body(eqn)
        if called is None:
            return self.look(eqn, values, context)
        if name == "shard_map":
            context = context._replace(devices=context.devices * manual_devices(eqn))
        return self.walk(called, values, context)

    def _loop(self, eqn: Eqn, values: list[Value], context: Context) -> list[Value]:
        read = loop(eqn)
        tested, consts, carry, slices = read.split(values)
        length = 1 if read.length is None else read.length
        context = context._replace(times=context.times * length)

        def run(carry: Sequence[Value], context: Context) -> list[Value]:
            return self.walk(read.body, [*consts, *carry, *slices], context)

        carry = _settle(carry, run, context)
        if read.condition is not None:
            self.walk(read.condition, [*tested, *carry], context)
        return run(carry, context)


def _settle(
    carry: Sequence[Value],
    run: Callable[[Sequence[Value], Context], list[Value]],
    context: Context,
) -> Sequence[Value]:
    """What is known about a carry in every iteration."""
    while True:
        outs = run(carry, context._replace(is_settled=False))
        joined = [
            before._replace(promotion=None).joined(after)
            for before, after in zip(carry, outs[: len(carry)], strict=True)
        ]
        if joined == carry:
            return carry
        carry = joined


def _join(values: Sequence[Value]) -> Value:
    return functools.reduce(Value.joined, values)
