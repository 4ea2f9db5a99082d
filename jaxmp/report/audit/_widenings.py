"""Silent widenings: half values that one float32 operand made float32."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jaxmp._jaxpr import flax_internals, jax_functions
from jaxmp._jaxpr.site import Site
from jaxmp.report.audit._dataflow import Context
from jaxmp.report.audit._origins import Promotion, Value
from jaxmp.report.audit.records import Matmul, Widening


@dataclasses.dataclass(eq=False)
class Group:
    """The widenings that one line makes for one reason, and where they lead."""

    promotion: Promotion
    reason: Value
    path: str
    is_gradient: bool
    argument: str = ""
    times: int = 0
    growth: int = 0
    matmuls: int = 0
    flops: int = 0
    reaches_output: bool = False
    reaches_scalar: bool = False
    leaves_line: bool = False
    meets_smaller: bool = False

    @property
    def library(self) -> str | None:
        """The library whose code widens, None for the user's own."""
        return self.promotion.site.library

    @property
    def is_silent(self) -> bool:
        """Whether this is worth reporting; most of what is not is cast back at once.

        Reported is what reaches a matmul, or leaves the program in float32, and a
        scalar or constant in the user's own code whose effect outlasts its line. A
        loss ends in a scalar: there, an argument of the same shape is a target.
        """
        kind = self.reason.blame.kind
        if self.matmuls:
            return True
        if self.library is None and kind in ("scalar", "constant"):
            return self.leaves_line or self.reaches_output or self.reaches_scalar
        if self.is_gradient or self.library == "optax":
            return False
        is_scale = kind == "argument" and self.meets_smaller and self.library is None
        return self.reaches_output or (is_scale and self.reaches_scalar)

    def widening(self) -> Widening:
        """The group as users see it."""
        kind, culprit = _culprit(self)
        half, blame = self.promotion.half, self.reason.blame
        return Widening(
            source=self.promotion.site.source,
            path=self.path,
            dtype=str(half),
            shape=self.promotion.shape,
            culprit=culprit,
            kind=kind,
            times=self.times,
            bytes=self.growth,
            matmuls=self.matmuls,
            flops=self.flops,
            repair=_REPAIRS[kind].format(
                half=half,
                name=blame.name,
                argument=self.argument or blame.argument or "x",
            ),
        )


_REPAIRS = {
    "scalar": (
        "Write the number as a Python number, {name}: that takes the dtype of the "
        "array. np.float32(...), np.sqrt(...) and jnp.float32(...) do not."
    ),
    "constant": (
        "Make the constant in the dtype of the array that it meets: "
        "constant.astype(x.dtype)."
    ),
    "argument": "Cast it where it is used: {argument}.astype(x.dtype).",
    "layer": (
        "Give the layer dtype=jnp.{half}, or use "
        "jaxmp.apply_policy(model, 'mixed_{half}')."
    ),
    "computed": "Cast the float32 operand, or the result: y.astype(x.dtype).",
    "cast": "Cast the result back: y.astype(x.dtype).",
    "mixed": "Cast one of the two: y.astype(x.dtype).",
}


def _culprit(group: Group) -> tuple[str, str]:
    """The kind of operand that widens, and the operand in words."""
    origin = group.reason.blame
    argument = group.argument or origin.argument
    if group.library == "flax":
        which = f", such as {argument}" if argument else ""
        return "layer", f"a layer of Flax's with float32 parameters{which}"
    where = "" if origin.site is None else f" at {origin.site.source}"
    if origin.kind == "scalar":
        return origin.kind, f"a NumPy or JAX scalar of float32, {origin.name}"
    if origin.kind == "constant":
        made = f", made{where}" if where else ""
        return origin.kind, f"the constant {origin.name}{made}"
    if origin.kind == "argument":
        return origin.kind, f"the float32 argument {origin.name}"
    if origin.kind == "cast":
        return origin.kind, f"a value that is cast to float32{where}"
    if origin.kind == "mixed":
        return origin.kind, "an operand of the other half dtype"
    source = f" from {argument}" if argument else ""
    return origin.kind, f"a float32 value computed{where}{source}"


def is_silent_cast(site: Site) -> bool:
    """Whether nobody wrote down this cast from half to float32."""
    written = site.written
    promotes = jax_functions.promotes(written) or flax_internals.promotes(written)
    return promotes or not jax_functions.asks_for_cast(written)


class Widenings:
    """The groups that have been found so far, by a key for each line and reason."""

    def __init__(self):
        self.groups: dict[Any, Group] = {}

    def add(
        self, promotion: Promotion, reason: Value, context: Context, is_gradient: bool
    ) -> None:
        """Adds a promotion to the groups that have made its result wide."""
        promotion.is_explained = context.is_settled
        if context.in_autocast or _is_by_policy(promotion.site):
            return
        if reason.groups:
            promotion.groups = reason.groups
            key = min(reason.groups, key=str)
        else:
            key = _key(promotion, reason)
            promotion.groups = frozenset([key])
        if key not in self.groups:
            self.groups[key] = Group(promotion, reason, context.site.path, is_gradient)
        group = self.groups[key]
        if not reason.groups:
            group.meets_smaller |= reason.size < math.prod(promotion.shape)
        if context.is_settled:
            group.times += context.runs * (not reason.groups)
            group.growth += context.runs * promotion.growth

    def used(self, keys: Iterable[Any], site: Site) -> None:
        """Notes that what the groups made wide is read at a site."""
        for key in keys:
            group = self.groups[key]
            group.leaves_line |= site.source != group.promotion.site.source

    def slowed(self, keys: Iterable[Any], matmul: Matmul) -> None:
        """Notes that the groups made a matmul float32."""
        for key in keys:
            self.groups[key].matmuls += matmul.times
            self.groups[key].flops += matmul.flops

    def silent_keys(self) -> frozenset[Any]:
        """The keys of the groups that are reported."""
        return frozenset(k for k, group in self.groups.items() if group.is_silent)

    def found(self) -> tuple[Widening, ...]:
        """Those that are silent, the costliest first."""
        groups = [group for group in self.groups.values() if group.is_silent]
        found = [group.widening() for group in groups]
        return tuple(sorted(found, key=lambda w: (-w.flops, -w.bytes)))


def _key(promotion: Promotion, reason: Value) -> Any:
    origin = reason.blame
    name = origin.name if origin.kind in ("scalar", "argument") else ""
    half = None if origin.kind == "mixed" else promotion.half
    return promotion.site.source, origin.kind, name, half


def _is_by_policy(site: Site) -> bool:
    """A layer of Flax's under `apply_policy` computes in what the policy says."""
    return site.library == "flax" and "jaxmp.modules" in site.packages
