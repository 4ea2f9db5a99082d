"""Name scopes: the modules and transformations that an equation was traced in."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend import source_info_util

from jaxmp._jaxpr.types import Eqn

EXPORT_SCOPE = "jit(call)/call_exported/"
"""What a program that `jax.export` wrote has in front of its own scopes."""

QUANTIZE_PREFIX = "jaxmp.quantize."
"""What the mark of a layer whose matmuls have a recipe of their own begins with."""
_OWN = ("jaxmp/", QUANTIZE_PREFIX)
_ISLANDS = ("jaxmp/island", "jaxmp/softmax")

_CLASS = re.compile(r"[A-Z]\w*?(?<!_\d)(?<!_\d\d)")


def scope_names(eqn: Eqn) -> tuple[str, ...]:
    """The name scopes and transformations around an equation, as they were traced."""
    return tuple(getattr(part, "name", "") for part in stack_parts(eqn))


def name_scopes(eqn: Eqn, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The name scopes around an equation, normalised; transformations are left out.

    Args:
      eqn: the equation.
      without: names to leave out.
    """
    without = frozenset(without)
    found: tuple[str, ...] = ()
    for run in _runs(stack_parts(eqn)):
        own = normalise(tuple(name for name in run if name not in without))
        found = own if own[: len(found)] == found else found + own
    return found


def _runs(parts: Iterable[Any]) -> list[list[str]]:
    """The name scopes, cut where the backward pass of an island repeats them."""
    runs: list[list[str]] = [[]]
    for part in parts:
        if type(part).__name__ == "Scope":
            runs[-1].append(part.name)
        elif runs[-1] and runs[-1][-1].startswith(_ISLANDS):
            runs.append([])
    return runs


def is_backward(eqn: Eqn) -> bool:
    """True for what a backward pass inside the function is made of."""
    return "transpose" in _transformations(eqn)


def is_computed_again(eqn: Eqn) -> bool:
    """True for what `jax.checkpoint` computes again in a backward pass."""
    return "rematted_computation" in scope_names(eqn)


def count_derivatives(eqn: Eqn) -> int:
    """How many derivatives it is inside: 2 in a `jax.jvp` of a `jax.grad`."""
    return _transformations(eqn).count("jvp")


def stack_parts(eqn: Eqn) -> tuple[Any, ...]:
    """The parts of the name stack of an equation, outermost first."""
    return () if eqn is None else eqn.source_info.name_stack.stack


def scope_parts(name: str) -> tuple[Any, ...]:
    """The parts that a name scope adds to a name stack."""
    return source_info_util.new_name_stack(name).stack


def inside_current(parts: tuple[Any, ...]) -> Any:
    """The name stack of what is traced here, with more parts inside."""
    current = source_info_util.current_name_stack()
    return type(current)(current.stack + parts)


def _transformations(eqn: Eqn) -> list[str]:
    return [
        part.name for part in stack_parts(eqn) if type(part).__name__ == "Transform"
    ]


@functools.lru_cache(maxsize=4096)
def normalise(names: tuple[str, ...]) -> tuple[str, ...]:
    """Splits scope names at "/" and strips `.method` from each part.

    What jaxmp itself names, `jaxmp/<region>/<dtype>`, is left out.
    """
    names = tuple(name for name in names if not name.startswith(_OWN))
    parts = [part for name in names for part in name.split("/")]
    return tuple(part.split(".")[0] if part[:1] != "." else part for part in parts)


def layer_path(scopes: Sequence[str]) -> str:
    """Joins scopes, without the name of the root module's class.

    Args:
      scopes: outermost first, such as `("Decoder", "block_0", "up")`.

    Returns:
      What `PolicyRule(path=...)` matches, such as `"block_0/up"`.
    """
    is_root = bool(scopes) and _CLASS.fullmatch(scopes[0]) is not None
    return "/".join(scopes[1:] if is_root else scopes)
