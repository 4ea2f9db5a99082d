"""`Origin`: why a value is not finite, and what the operation behind it was given."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.types import Array
from jaxmp.numerics.ranges._finiteness import What
from jaxmp.numerics.replay._site import ReplaySite

NARROW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


class Operand(NamedTuple):
    """What an operation was given, or gave.

    Attributes:
      dtype: name of its dtype.
      shape: its shape.
      low, high: smallest and largest finite number in it; NaN if there is none.
      typical: mean magnitude of its finite numbers.
      nonfinite: how many of its numbers are infinite or NaN.
      at: its element where the result first is not finite, None if it has none there.
    """

    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    typical: float
    nonfinite: int
    at: float | None

    def __str__(self) -> str:
        shape = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.shape == () and not self.nonfinite:
            return f"{shape} {self.low:.4g}"
        nonfinite = f", {self.nonfinite} not finite" if self.nonfinite else ""
        if np.isnan(self.low):
            return f"{shape} with no finite number"
        return f"{shape} between {self.low:.4g} and {self.high:.4g}{nonfinite}"


def describe(x: Array, at: tuple[int, ...] | None = None) -> Operand:
    """The range of an array, and its element at an index of an array like it."""
    shape = tuple(x.shape)
    nan = float("nan")
    if not jnp.issubdtype(x.dtype, jnp.number):
        return Operand(str(x.dtype), shape, nan, nan, nan, 0, None)
    if jnp.iscomplexobj(x):
        wide = np.abs(np.asarray(x).astype(np.complex128))
    else:
        wide = np.asarray(x).astype(np.float64)
    finite = wide[np.isfinite(wide)]
    at = () if shape == () else at
    return Operand(
        str(x.dtype),
        shape,
        float(finite.min()) if finite.size else nan,
        float(finite.max()) if finite.size else nan,
        float(np.abs(finite).mean()) if finite.size else nan,
        int(wide.size - finite.size),
        None if at is None else float(wide[at]),
    )


def index_in(shape: tuple[int, ...], at: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where an operand of elementwise operations has the element; it may broadcast."""
    if len(shape) != len(at):
        return None
    index = tuple(0 if n == 1 else i for i, n in zip(at, shape, strict=True))
    return index if all(i < n for i, n in zip(index, shape, strict=True)) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Why a value is not finite.

    Attributes:
      kind: `"made"` out of finite numbers, `"undefined"` (a NaN made out of
        infinities), `"passed"` on from operands, or what the value itself is: an
        `"input"` or a `"constant"`.
      what: what it is.
      parents: the origins that are to blame.
      order: number of the operation in the order of execution.
      site: where the operation stands; of a constant, the one that reads it.
      iterations: of the loops around it.
      operands, result: of an operation that made it.
      name: of an input.
      values: what an operation was given, if it computes in 16 bits or fewer.
    """

    kind: Literal["made", "undefined", "passed", "input", "constant"]
    what: What
    parents: tuple["Origin", ...] = ()
    order: int = 0
    site: ReplaySite | None = None
    iterations: tuple[int, ...] = ()
    operands: tuple[Operand, ...] = ()
    result: Operand | None = None
    name: str = ""
    values: tuple[Array, ...] = dataclasses.field(default=(), repr=False)

    @property
    def primitive(self) -> str:
        """Name of the operation's primitive."""
        assert self.site is not None
        return self.site.primitive

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the operation."""
        assert self.site is not None
        return self.site.eqn.params

    @property
    def gave(self) -> Operand:
        """The range of what the operation made, of kinds `"made"` and `"undefined"`."""
        assert self.result is not None
        return self.result

    @property
    def is_narrow(self) -> bool:
        """Whether an operation took or gave a number of 16 bits or fewer."""
        numbers = (*self.operands, self.result)
        return any(x is not None and x.dtype in NARROW for x in numbers)


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Origin):
    """The origin of what a scan's iterations gave, each of which has its own."""

    rows: tuple[Origin | None, ...] = ()

    @staticmethod
    def of(origins: Sequence[Origin | None]) -> "Origin | None":
        """The origin of a result with one origin for each iteration."""
        parents = tuple(dict.fromkeys(o for o in origins if o is not None))
        if not parents:
            return None
        what = "NaN" if any(parent.what == "NaN" for parent in parents) else "Inf"
        return Stacked("passed", what, parents, rows=tuple(origins))


def row_origin(origin: Origin | None, index: int) -> Origin | None:
    """The origin of one slice of a value."""
    if isinstance(origin, Stacked):
        return origin.rows[index] or origin
    return origin


def ancestors(origins: Iterable[Origin]) -> list[Origin]:
    """Origins and all that is behind them, in the order of execution."""
    found: dict[Origin, None] = {}
    pending = list(origins)
    while pending:
        origin = pending.pop()
        if origin not in found:
            found[origin] = None
            pending.extend(origin.parents)
    return sorted(found, key=lambda origin: origin.order)
