"""Follows every value of a program through its calls and loops."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmp._jaxpr.marks import AUTOCAST_SCOPE, FULL_PRECISION_SCOPE, LAYER_SCOPE, scopes
from jaxmp._jaxpr.scopes import is_backward, scope_names
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.versions import open_jaxpr, scan_arity
from jaxmp.report.audit._values import Value, constant

# Kernels are programs of their own, on blocks of what is passed to them.
_OPAQUE = frozenset(("pallas_call", "core_map", "run_state", "mosaic_gpu_call"))

# What they hold says how two numbers become one, and is no call.
_REDUCERS = frozenset(("reduce", "reduce_window"))


class Context(NamedTuple):
    """What the equations of a body inherit from the calls around it.

    Attributes:
      times: how often it runs; the iterations of a `while` are not known, and count 1.
      devices: on how many devices at once.
      path: name scopes and modules.
      in_backward: whether the call is part of a backward pass.
      in_autocast: whether autocast decides about its dtypes.
      in_full_precision: whether `full_precision` keeps autocast from it.
      site: where the call stands.
      is_settled: False while the carries of a loop around it are being found out.
    """

    times: int = 1
    devices: int = 1
    path: tuple[str, ...] = ()
    in_backward: bool = False
    in_autocast: bool = False
    in_full_precision: bool = False
    site: Site = Site(None, None)
    is_settled: bool = True

    def at(self, eqn: Any) -> "Context":
        """The context of an equation, and of the bodies that it holds."""
        names = scope_names(eqn)
        return self._replace(
            path=self.path + scopes(eqn),
            in_backward=self.in_backward or is_backward(eqn),
            in_autocast=(self.in_autocast or AUTOCAST_SCOPE in names)
            and LAYER_SCOPE not in names,
            in_full_precision=self.in_full_precision or FULL_PRECISION_SCOPE in names,
            site=Site(eqn.source_info.traceback, self.site),
        )

    @property
    def under(self) -> str:
        """What of jaxmp's decides about the dtypes here, or an empty string."""
        if self.in_full_precision:
            return "full_precision"
        if self.in_autocast:
            return "autocast"
        return "apply_policy" if "jaxmp.modules" in self.site.packages else ""


class Walker:
    """Walks a jaxpr and the jaxprs in it; `look` sees every equation that is no call.

    Attributes:
      look: a function `(equation, values of its operands, context)` that returns the
        values of its results.
      body: a function `(jaxpr, context)` that is called before each jaxpr is walked.
    """

    def __init__(self, look: Any, body: Any):
        self.look = look
        self.body = body

    def walk(self, jaxpr: Any, inputs: Sequence[Value], context: Context) -> list[Any]:
        """Walks one jaxpr.

        Args:
          jaxpr: with its constants or without.
          inputs: what is known of its inputs.
          context: what is around it.

        Returns:
          What is known of its outputs.
        """
        self.body(jaxpr, context)
        opened = open_jaxpr(jaxpr)
        values = {v: constant(v) for v in opened.constvars}
        values |= zip(opened.invars, inputs, strict=True)

        def read(atom):
            return constant(atom) if hasattr(atom, "val") else values[atom]

        for eqn in opened.eqns:
            outs = self.equation(eqn, [read(v) for v in eqn.invars], context.at(eqn))
            values |= zip(eqn.outvars, outs, strict=True)
        return [read(v) for v in opened.outvars]

    def equation(
        self, eqn: Any, values: list[Value], context: Context
    ) -> Sequence[Value]:
        """Walks one equation, and the bodies of a call."""
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, values, context)
        if name == "while":
            return self.while_loop(eqn, values, context)
        if name == "cond":
            branches = [
                self.walk(body, values[1:], context) for body in eqn.params["branches"]
            ]
            return [_join(outs) for outs in zip(*branches, strict=True)]
        body = _body(eqn)
        if body is None:
            return self.look(eqn, values, context)
        if name == "shard_map":
            sizes = eqn.params["mesh"].shape
            axes = eqn.params["newly_manual_axes"]
            devices = math.prod(sizes[axis] for axis in axes)
            context = context._replace(devices=context.devices * devices)
        return self.walk(body, values, context)

    def scan(self, eqn: Any, values: list[Value], context: Context) -> list[Value]:
        num_consts, num_carry = scan_arity(eqn.params)
        end = num_consts + num_carry
        consts, init, slices = values[:num_consts], values[num_consts:end], values[end:]
        context = context._replace(times=context.times * eqn.params["length"])

        def body(carry, context):
            inputs = [*consts, *carry, *slices]
            return self.walk(eqn.params["jaxpr"], inputs, context)

        carry = _settle(init, body, context)
        return body(carry, context)

    def while_loop(
        self, eqn: Any, values: list[Value], context: Context
    ) -> list[Value]:
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        consts, init = values[first:second], values[second:]

        def body(carry, context):
            return self.walk(eqn.params["body_jaxpr"], [*consts, *carry], context)

        carry = _settle(init, body, context)
        self.walk(eqn.params["cond_jaxpr"], [*values[:first], *carry], context)
        return body(carry, context)


def _settle(carry: list[Value], body: Any, context: Context) -> list[Value]:
    """What is known of a carry in every iteration."""
    while True:
        outs = body(carry, context._replace(is_settled=False))
        joined = [
            _unpromoted(a).joined(b)
            for a, b in zip(carry, outs[: len(carry)], strict=True)
        ]
        if joined == carry:
            return carry
        carry = joined


def _join(values: Sequence[Value]) -> Value:
    first, *others = values
    for value in others:
        first = first.joined(value)
    return first


def _unpromoted(value: Value) -> Value:
    return value._replace(promotion=None)


def _body(eqn: Any) -> Any:
    """The jaxpr of a call that runs it once, on its own operands."""
    if eqn.primitive.name in _OPAQUE | _REDUCERS:
        return None
    for name in ("jaxpr", "call_jaxpr"):
        body = eqn.params.get(name)
        if body is not None and hasattr(open_jaxpr(body), "eqns"):
            is_call = len(open_jaxpr(body).invars) == len(eqn.invars)
            same = len(open_jaxpr(body).outvars) == len(eqn.outvars)
            return body if is_call and same else None
    return None


def bodies(eqn: Any) -> list[Any]:
    """Every jaxpr that an equation holds, but those of kernels."""
    if eqn.primitive.name in _OPAQUE | _REDUCERS:
        return []
    found = []
    for value in eqn.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found
