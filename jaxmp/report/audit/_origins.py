"""What the audit knows about a value: where its dtype comes from.

A *wide* value is float32 or float64. It enters the program as an argument, a constant
or a deliberate cast, and is followed to where it meets a half value and widens it.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Atom

WIDE = frozenset(map(jnp.dtype, (jnp.float32, jnp.float64)))

# Kinds of origin. Of several wide operands, the first in this order gets the blame.
_KINDS = ("argument", "scalar", "constant", "computed", "cast", "mixed")


class Origin(NamedTuple):
    """Where the dtype of a wide value comes from.

    Attributes:
      kind: `"argument"`, `"scalar"`, `"constant"`, `"computed"`, `"cast"` for one that
        the program asks for, or `"mixed"` where both half dtypes meet.
      name: path of an argument, value of a scalar, dtype and shape of a constant, or
        the operation that computed the value.
      site: where the value was computed or cast.
      argument: path of the argument that it was computed from, if there is one.
    """

    kind: str
    name: str = ""
    site: Site | None = None
    argument: str = ""


@dataclasses.dataclass(eq=False, slots=True)
class Promotion:
    """A cast of a half value by type promotion.

    Attributes:
      site: where it was cast.
      shape: of the value.
      half: the dtype that was lost.
      wide: the dtype that it became.
      groups: keys of the silent widenings that it belongs to.
      is_explained: whether the operand that caused it has been found.
    """

    site: Site
    shape: tuple[int, ...]
    half: np.dtype
    wide: np.dtype
    groups: frozenset[Any] = frozenset()
    is_explained: bool = False

    @property
    def growth(self) -> int:
        """By how many bytes the value grew."""
        return math.prod(self.shape) * (self.wide.itemsize - self.half.itemsize)


class Value(NamedTuple):
    """What is known about one variable.

    Attributes:
      origin: where its dtype comes from.
      groups: keys of the silent widenings without which it would not be wide.
      is_gradient: whether a backward pass contributed to it.
      promotion: the cast that made it, if that was type promotion.
      size: number of elements of the array that it was broadcast from.
      is_data: whether it comes from the arguments, moved about or turned into an index.
    """

    origin: Origin | None = None
    groups: frozenset[Any] = frozenset()
    is_gradient: bool = False
    promotion: Promotion | None = None
    size: int = 1
    is_data: bool = False

    @property
    def blame(self) -> Origin:
        """Its origin, as far as it is known."""
        return self.origin or Origin("computed")

    def joined(self, other: "Value") -> "Value":
        """What is known about a value that is either of the two."""
        return self._replace(
            groups=self.groups | other.groups,
            is_gradient=self.is_gradient or other.is_gradient,
            is_data=self.is_data and other.is_data,
        )


def is_wide(atom: Atom) -> bool:
    """True for a float32 or float64 that would make a half value wide."""
    return getattr(atom.aval, "dtype", None) in WIDE and not atom.aval.weak_type


def likeliest(values: Iterable[Value]) -> Value:
    """The value to blame for a wide result, of several that could be the reason."""
    return min(values, key=lambda v: (not v.groups, _KINDS.index(v.blame.kind)))


def argument_value(atom: Atom, path: str) -> Value:
    """What is known about an argument of the program."""
    size = getattr(atom.aval, "size", 1)
    return Value(Origin("argument", path, argument=path), size=size, is_data=True)


def constant_value(atom: Atom) -> Value:
    """What is known about a literal, or an array that the function closes over."""
    aval = atom.aval
    if not hasattr(aval, "dtype"):
        return Value()
    if is_literal(atom) and aval.size == 1 and aval.dtype in WIDE:
        number = np.asarray(atom.val, aval.dtype)[()]
        return Value(Origin("scalar", str(number)))
    origin = Origin("constant", array_name(aval))
    return Value(origin, size=aval.size, is_data=aval.size == 1)


def array_name(aval: Any) -> str:
    """Dtype and shape, such as `"float32[8, 16]"`."""
    return f"{aval.dtype}{list(aval.shape)}"
