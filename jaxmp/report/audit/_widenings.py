"""Silent widenings: half values that one float32 operand made float32."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxmp._jaxpr import sources as _sources
from jaxmp._jaxpr.site import Site
from jaxmp.report.audit._values import Origin, Promotion, Value

# JAX functions whose casts are asked for; every other cast inside JAX is promotion.
_CASTS = frozenset(("astype", "_astype", "asarray", "array", "convert_element_type"))


class Widening(NamedTuple):
    """A half value that becomes float32 because of another operand.

    Attributes:
      source: the user's line.
      path: name scopes and modules around it, where it was first seen.
      dtype: the half dtype that was lost.
      shape: of the value, where it was first seen.
      culprit: the operand that did it, in words.
      kind: `"scalar"`, `"constant"`, `"argument"`, `"computed"`, `"cast"`, `"layer"` or
        `"mixed"`: what kind of operand that is.
      times: how often the line does so, loops included.
      bytes: by how much all those values grow, those that follow from them included.
      matmuls: how many matmuls run in float32 because of it.
      flops: what these matmuls compute.
      repair: what to write instead.
    """

    source: _sources.Source | None
    path: str
    dtype: str
    shape: tuple[int, ...]
    culprit: str
    kind: str
    times: int
    bytes: int
    matmuls: int
    flops: int
    repair: str

    def __str__(self) -> str:
        return (
            f"{self.dtype}{list(self.shape)} becomes float32 because of {self.culprit}"
        )


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
        """Whether this is worth telling; most of what is not is cast back at once.

        Told is what reaches a matmul, or leaves the program in float32, and a scalar or
        constant in the user's own code whose effect outlasts its line. A loss ends in a
        scalar: there, an argument of the same shape is a target.
        """
        kind = _origin(self.reason).kind
        if self.matmuls:
            return True
        if self.library is None and kind in ("scalar", "constant"):
            return self.leaves_line or self.reaches_output or self.reaches_scalar
        if self.is_gradient or self.library == "optax":
            return False
        is_scale = kind == "argument" and self.meets_smaller and self.library is None
        return self.reaches_output or (is_scale and self.reaches_scalar)

    def told(self) -> Widening:
        """The group as users see it."""
        kind, culprit = _culprit(self)
        repair = _REPAIRS[kind].format(
            half=self.promotion.half,
            name=_origin(self.reason).name,
            argument=self.argument or _origin(self.reason).argument or "x",
        )
        return Widening(
            self.promotion.site.source,
            self.path,
            str(self.promotion.half),
            self.promotion.shape,
            culprit,
            kind,
            self.times,
            self.growth,
            self.matmuls,
            self.flops,
            repair,
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
    origin = _origin(group.reason)
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


def _origin(value: Value) -> Origin:
    return value.origin or Origin("computed")


def is_promotion(site: Site) -> bool:
    """Whether a cast from half to float32 is one that nobody wrote down."""
    written = site.written
    if any(name.startswith("promote_") for name in written.inside_jax):
        return True
    if written.library == "flax" and written.caller.startswith("promote_dtype"):
        return True
    return not _CASTS.intersection(written.inside_jax)


class Widenings:
    """The groups that have been found so far."""

    def __init__(self):
        self.groups: dict[Any, Group] = {}

    def add(
        self, promotion: Promotion, reason: Value, context: Any, is_gradient: bool
    ) -> frozenset[Any]:
        """Adds a promotion, and gives the keys of what has made its result wide."""
        promotion.is_explained = context.is_settled
        if context.in_autocast or _is_by_policy(promotion.site):
            return frozenset()
        if reason.groups:
            keys = reason.groups
        else:
            origin = _origin(reason)
            source = promotion.site.source
            name = origin.name if origin.kind in ("scalar", "argument") else ""
            half = None if origin.kind == "mixed" else promotion.half
            keys = frozenset([(source, origin.kind, name, half)])
        promotion.groups = keys
        key = min(keys, key=str) if reason.groups else next(iter(keys))
        if key not in self.groups:
            path = "/".join(context.path)
            self.groups[key] = Group(promotion, reason, path, is_gradient)
        group = self.groups[key]
        size = int(np.prod(promotion.shape))
        if not reason.groups:
            group.meets_smaller |= reason.size < size
        if context.is_settled:
            times = context.times * context.devices
            group.times += times * (not reason.groups)
            group.growth += times * promotion.growth
        return keys

    def used(self, keys: Iterable[Any], site: Site) -> None:
        """Notes that what the groups made wide is read at a site."""
        for key in keys:
            group = self.groups[key]
            group.leaves_line |= site.source != group.promotion.site.source

    def silent_keys(self) -> frozenset[Any]:
        """The keys of the groups that are told."""
        return frozenset(k for k, group in self.groups.items() if group.is_silent)

    def told(self) -> tuple[Widening, ...]:
        """Those that are silent, the costliest first."""
        silent = [group.told() for group in self.groups.values() if group.is_silent]
        return tuple(sorted(silent, key=lambda w: (-w.flops, -w.bytes)))


def _is_by_policy(site: Site) -> bool:
    """A layer of Flax's under `apply_policy` computes in what the policy says."""
    return site.library == "flax" and "jaxmp.modules" in site.packages
