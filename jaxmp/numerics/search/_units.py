"""What a search for a policy may keep in float32, or in half instead of smaller.

A unit is what one rule can name: a layer (the operations under one innermost path), or
one primitive under a path that holds further layers, or one primitive of a function
outside all name scopes.
"""

import dataclasses
import re
from collections.abc import Iterable

from jaxmp.casting import OpRule
from jaxmp.numerics.search._half_operations import Key
from jaxmp.policy import PolicyRule
from jaxmp.policy.quantize import NOT_QUANTIZED


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one rule names.

    Attributes:
      name: for people, and for saved searches.
      rule: keeps it in float32, or its matmuls in half.
      depth: how many name scopes it is in.
      stays_in: `"float32"` or `"half"`.
    """

    name: str
    rule: PolicyRule | OpRule
    depth: int
    stays_in: str = "float32"


def units_of(keys: Iterable[Key]) -> dict[Key, Unit]:
    """The unit of each operation, those of the backward pass included.

    A backward operation belongs to the layer, or the line, whose derivative it is.
    """
    keys = list(keys)
    forward = [key for key in keys if not key.is_backward]
    paths = {key.path for key in forward if key.path}
    inner = {path for path in paths if not any(p.startswith(f"{path}/") for p in paths)}
    root = _common_root(paths)
    found = {key: _unit(key, inner, root) for key in forward}
    lines = {(key.path, key.line): unit for key, unit in found.items()}
    for key in keys:
        if key.is_backward and key.path in inner:
            found[key] = _unit(key, inner, root)
        elif key.is_backward and (key.path, key.line) in lines:
            found[key] = lines[key.path, key.line]
    return found


def matmul_units_of(keys: Iterable[Key]) -> dict[Key, Unit]:
    """The units that keep quantised matmuls in half; gradients go with their matmul."""
    keys = [key._replace(primitive="dot_general") for key in keys]
    return {key: _in_half(unit) for key, unit in units_of(keys).items()}


def _in_half(unit: Unit) -> Unit:
    rule = dataclasses.replace(
        unit.rule, compute=None, quantize=NOT_QUANTIZED, allow_unused=True
    )
    return Unit(f"{unit.name} in half", rule, unit.depth, "half")


def rules_of(units: Iterable[Unit]) -> tuple[PolicyRule | OpRule, ...]:
    """The rules of units, inner ones first: the first that matches decides."""
    inner_first = sorted(units, key=lambda unit: unit.depth, reverse=True)
    return tuple(unit.rule for unit in inner_first)


def _unit(key: Key, inner: set[str], root: str) -> Unit:
    primitive, path, line, _ = key
    if path:
        depth = path.count("/") + 1
        is_layer = path in inner
        path = path.removeprefix(f"{root}/")
        if is_layer:
            rule = PolicyRule(path=re.escape(path), compute="float32")
            return Unit(path, rule, depth)
        rule = OpRule(path=re.escape(path), primitive=primitive, compute="float32")
        return Unit(f"{primitive} in {path}", rule, depth)
    # The rule of a function around this one may come first, and match all of it.
    function = None if line is None else line.function.rpartition(".")[2]
    rule = OpRule(
        primitive=primitive,
        function=None if function is None else re.escape(function),
        compute="float32",
        allow_unused=True,
    )
    return Unit(f"{primitive} in function {function}", rule, 0)


def _common_root(paths: set[str]) -> str:
    """The root module, which rules leave out, if there is one around everything."""
    roots = {path.partition("/")[0] for path in paths}
    return roots.pop() if len(roots) == 1 and paths != roots else "/"
