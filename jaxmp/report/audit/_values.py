"""What the audit knows about a value: where its dtype comes from.

A *wide* value is float32 or float64. It is followed from where it enters the program,
as an argument, a constant or a deliberate cast, to the places where it meets a half
value and makes that wide as well.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr import sources as _sources

WIDE = frozenset(map(jnp.dtype, (jnp.float32, jnp.float64)))


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Site:
    """Where an equation stands: its traceback, and the call around it."""

    traceback: Any
    around: "Site | None"

    @property
    def written(self) -> _sources.Written:
        """How the equation was written."""
        return _sources.written(self.traceback)

    @property
    def source(self) -> _sources.Source | None:
        """The user's line; for what JAX traced once for all, that of the call."""
        site: Site | None = self
        while site is not None:
            if site.written.source is not None:
                return site.written.source
            site = site.around
        return None

    @property
    def library(self) -> str | None:
        """The library that called JAX here, None for the user's own code."""
        site: Site | None = self
        while site is not None:
            if site.written.caller:
                return site.written.library
            site = site.around
        return None

    @property
    def packages(self) -> frozenset[str]:
        """Every library on the stack."""
        around = frozenset() if self.around is None else self.around.packages
        return self.written.packages | around


class Origin(NamedTuple):
    """Where the dtype of a wide value comes from.

    Attributes:
      kind: `"scalar"`, `"constant"`, `"argument"`, `"cast"` for one that the program
        makes on purpose, or `"computed"`.
      name: what it is called: the path of an argument, the value of a scalar, the
        operation that computed it.
      site: where it was computed or cast.
      argument: path of the argument that it was computed from, if there is one.
    """

    kind: str
    name: str = ""
    site: Site | None = None
    argument: str = ""


# What to call the reason for a wide result, if there is more than one.
_KINDS = ("argument", "scalar", "constant", "computed", "cast", "mixed")


@dataclasses.dataclass(eq=False, slots=True)
class Promotion:
    """A half value that type promotion has just cast, and not met its reason yet."""

    site: Site
    shape: tuple[int, ...]
    half: np.dtype
    wide: np.dtype
    groups: frozenset[Any] = frozenset()
    is_explained: bool = False

    @property
    def growth(self) -> int:
        """By how many bytes the value grew."""
        return int(np.prod(self.shape)) * (self.wide.itemsize - self.half.itemsize)


class Value(NamedTuple):
    """What is known of one variable.

    Attributes:
      origin: where it, and so its dtype, comes from.
      groups: keys of the silent widenings without which it would not be wide.
      is_gradient: whether a backward pass had a part in it.
      promotion: the cast that made it, if that was type promotion.
      size: of the array that it was broadcast from.
      is_data: whether it comes from the arguments, moved about or as an index is made.
    """

    origin: Origin | None = None
    groups: frozenset[Any] = frozenset()
    is_gradient: bool = False
    promotion: Promotion | None = None
    size: int = 1
    is_data: bool = False

    def joined(self, other: "Value") -> "Value":
        """What is known of a value that is the one or the other."""
        return self._replace(
            groups=self.groups | other.groups,
            is_gradient=self.is_gradient or other.is_gradient,
            is_data=self.is_data and other.is_data,
        )


def is_wide(atom: Any) -> bool:
    """True for a float32 or float64 that would make a half value wide."""
    return getattr(atom.aval, "dtype", None) in WIDE and not atom.aval.weak_type


def is_half(atom: Any) -> bool:
    """True for float16 and bfloat16."""
    return getattr(atom.aval, "dtype", None) in _tree.HALF


def best(values: Iterable[Value]) -> Value:
    """The value that is called the reason, of several that could be."""
    return min(values, key=_rank)


def _rank(value: Value) -> tuple[bool, int]:
    kind = "computed" if value.origin is None else value.origin.kind
    return not value.groups, _KINDS.index(kind)


def entering(atom: Any, path: str) -> Value:
    """The value of an argument."""
    size = getattr(atom.aval, "size", 1)
    return Value(Origin("argument", path, argument=path), size=size, is_data=True)


def constant(atom: Any) -> Value:
    """The value of a literal, or of an array that the function closes over."""
    aval = atom.aval
    if not hasattr(aval, "dtype"):
        return Value()
    if aval.size == 1 and hasattr(atom, "val") and aval.dtype in WIDE:
        number = np.asarray(atom.val, aval.dtype)[()]
        return Value(Origin("scalar", str(number)))
    origin = Origin("constant", f"{aval.dtype}{list(aval.shape)}")
    return Value(origin, size=aval.size, is_data=aval.size == 1)
