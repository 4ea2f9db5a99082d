"""Whether float32 mends what is not finite, and how to write that in the API in use.

    under autocast      `jaxmp.full_precision`, or a rule: the program is float32 before
                        autocast, so that `x.astype(jnp.float32)` changes nothing
    under apply_policy  `x.astype(jnp.float32)` in the user's own code, a rule in Flax's
    neither             `x.astype(jnp.float32)`

Advice is tried before it is given: on the whole program, if `find_nonfinite` puts
autocast on it, and otherwise on the operation and the numbers that it was given.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.calls import held
from jaxmp._jaxpr.execution import bind
from jaxmp._jaxpr.marks import AUTOCAST_SCOPE, LAYER_SCOPE
from jaxmp._jaxpr.primitives import RESULT_DTYPES
from jaxmp._jaxpr.scopes import layer_path, scope_names
from jaxmp._jaxpr.site import Site
from jaxmp.casting import OpRule
from jaxmp.numerics.nonfinite._origin import NARROW, Origin
from jaxmp.numerics.replay._float32_lines import Line
from jaxmp.numerics.replay._site import ReplaySite

_MOST_LINES = 6


class Remedy(NamedTuple):
    """What to compute in float32.

    Attributes:
      advice: in sentences; empty if there is nothing to advise.
      works: whether it was tried and helped; None if it was not tried.
    """

    advice: str = ""
    works: bool | None = None


# The whole program, under autocast


def remedy_under_autocast(
    first: Line | None,
    site: ReplaySite,
    run: Callable[[Sequence[OpRule], frozenset[Line]], Line | bool],
) -> Remedy:
    """Finds the layer, or the lines, that float32 mends, by trying them.

    Args:
      first: the line that made what is not finite.
      site: the operation.
      run: runs the program with more rules and with lines in float32; it returns the
        line that is not finite then, True if all is finite, False if it does not know.
    """
    path = _path(site)
    while path:
        rule = OpRule(path=path, compute="float32", allow_unused=True)
        if run([rule], frozenset()) is True:
            return Remedy(
                "Tried: everything is finite if this layer stays in float32: "
                f"rules=[jaxmp.PolicyRule(path={path!r}, compute='float32')]. "
                f"{_INVISIBLE}",
                True,
            )
        path = path.rpartition("/")[0]
    lines: dict[Line, None] = {}
    found: Line | bool | None = first
    while isinstance(found, Line) and found not in lines and len(lines) < _MOST_LINES:
        lines[found] = None
        found = run([], frozenset(lines))
    if not lines:
        return Remedy()
    if found is True:
        return Remedy(
            f"Tried: everything is finite if {_shown(lines)} in float32. Write "
            f"jaxmp.full_precision(f)(x), with what has to stay so in f. {_INVISIBLE}",
            True,
        )
    return Remedy(
        f"Tried: float32 does not mend it, neither for {_shown(lines, '')} alone nor "
        "for what follows from it.",
        False,
    )


_INVISIBLE = (
    "x.astype(jnp.float32) does nothing here: autocast starts from a float32 program."
)


def _path(site: ReplaySite) -> str:
    """The path of the layer, as a rule takes it; an einsum opens a scope of its own."""
    scopes = [scope for scope in site.scopes if "->" not in scope]
    path = layer_path(scopes)
    return path if re.fullmatch(r"[\w/]*", path) else re.escape(path)


def _shown(lines: Sequence[Line] | dict[Line, None], verb: str = " is") -> str:
    names = [f"{line.file.rpartition('/')[2]}:{line.number}" for line in lines]
    verb = " are" if verb and len(names) > 1 else verb
    return f"{', '.join(names)}{verb}"


# One operation, on the numbers that it was given


def remedy_of_operation(made: Origin, site: ReplaySite) -> Remedy:
    """Tries an operation in float32, and says how to write that at a place."""
    if made.kind != "made":
        return Remedy()
    how = _how(site)
    largest = _largest_in_float32(made)
    if largest is None:
        return Remedy(f"Untried: {how}.")
    if not math.isfinite(largest):
        return Remedy(
            f"float32 does not help (tried): {made.primitive} of these numbers is not "
            "finite there either.",
            False,
        )
    dtype = made.gave.dtype if made.gave.dtype in NARROW else "float16"
    advice = f"Compute this in float32: {how}. Tried on these numbers: it is finite"
    if largest > float(jnp.finfo(dtype).max):
        advice += (
            f", at most {largest:.4g}, which {dtype} cannot hold: what reads it has to "
            "be in float32 as well"
        )
    return Remedy(f"{advice}.", True)


def _largest_in_float32(made: Origin) -> float | None:
    """The largest magnitude of the results in float32; infinite if one is NaN.

    None if that cannot be tried.
    """
    if not made.values or made.site is None or held(made.site.eqn):
        return None
    params = dict(made.params)
    for name in RESULT_DTYPES.intersection(params):
        if str(params[name]) in NARROW:
            params[name] = np.dtype(np.float32)
    values = [
        x.astype(jnp.float32) if str(x.dtype) in NARROW else x for x in made.values
    ]
    try:
        results = bind(made.site.eqn.replace(params=params), values)
    except Exception:
        # The algorithm of a matmul may not take float32, for example.
        return None
    floats = [np.abs(np.asarray(x)) for x in results if _tree.is_inexact(x)]
    largest = max((float(x.max()) for x in floats if x.size), default=0.0)
    return math.inf if math.isnan(largest) else largest


def _how(site: ReplaySite) -> str:
    """How float32 is written where an operation stands."""
    path = _path(site)
    rule = f"rules=[jaxmp.PolicyRule(path={path!r}, compute='float32')]"
    if _is_under_autocast(site):
        written = (
            "jaxmp.full_precision(f)(x), with this line in f; x.astype(jnp.float32) "
            "does nothing under autocast"
        )
        return f"{written}; or {rule}" if path else written
    if "jaxmp.modules" in site.packages:
        if site.library in (None, "jax"):
            written = "x.astype(jnp.float32) in front of it"
            return f"{written}, or {rule} of apply_policy" if path else written
        return f"{rule} of apply_policy" if path else "a rule of apply_policy"
    if site.library == "flax":
        return "dtype=jnp.float32 of this layer"
    return "x.astype(jnp.float32) in front of it"


def _is_under_autocast(site: Site | None) -> bool:
    while site is not None:
        names = scope_names(site.eqn)
        if LAYER_SCOPE in names:
            return False
        if AUTOCAST_SCOPE in names:
            return True
        site = site.parent
    return False
