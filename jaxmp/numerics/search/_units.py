"""What a search for a policy may keep in float32, and what a policy does there.

A unit is what one rule can name: a layer (the operations under one innermost path), or
one primitive under a path that holds further layers, or one primitive of a function
outside of all name scopes.
"""

import dataclasses
import re
import weakref
from collections.abc import Iterable
from typing import Any

from jaxmp import _tree
from jaxmp._jaxpr.primitives import CAST, LAYOUT
from jaxmp.casting import OpRule
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.policy import PolicyRule

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one rule names.

    Attributes:
      name: for people, and for saved searches.
      rule: keeps it in float32.
      depth: how many name scopes it is in.
    """

    name: str
    rule: PolicyRule | OpRule
    depth: int


def key_of(site: ReplaySite) -> Key:
    """What an operation is known by in every program of one function."""
    return site.primitive, site.path, site.line, site.is_backward


class HalfOperations(Interpreter):
    """Finds the operations that a policy has in half.

    Attributes:
      whole: those whose operands or results are in half.
      handed_back: those that compute in float32, and whose results are cast to half.
    """

    def __init__(self):
        super().__init__()
        self.whole: dict[Key, ReplaySite] = {}
        self.handed_back: dict[Key, ReplaySite] = {}
        self._producers: dict[int, tuple[Any, ReplaySite]] = {}

    def observe(self, site, operands, results):
        if site.primitive == CAST:
            ref, producer = self._producers.get(id(operands[0]), (lambda: None, site))
            if ref() is operands[0] and _tree.is_half(results[0]):
                self.handed_back[key_of(producer)] = producer
        elif site.primitive in LAYOUT:
            return
        elif any(map(_tree.is_half, (*operands, *results))):
            self.whole[key_of(site)] = site
        else:
            for x in results:
                self._producers[id(x)] = weakref.ref(x), site


def find_half_operations(programs: Iterable[Program]) -> dict[Key, bool]:
    """The operations that are in half, and whether their operands are as well."""
    found: dict[Key, bool] = {}
    for program in programs:
        run = HalfOperations()
        run.run_program(program)
        found.update(dict.fromkeys(run.handed_back, False))
        found.update(dict.fromkeys(run.whole, True))
    return found


def units_of(keys: Iterable[Key]) -> dict[Key, Unit]:
    """The unit of each operation, those of the backward pass included.

    What a backward pass computes belongs to the layer, or to the line, whose derivative
    it is.
    """
    keys = list(keys)
    forward = [key for key in keys if not key[3]]
    paths = {path for _, path, _, _ in forward if path}
    inner = {path for path in paths if not any(p.startswith(f"{path}/") for p in paths)}
    root = _common_root(paths)
    found = {key: _unit(key, inner, root) for key in forward}
    lines = {(path, line): unit for (_, path, line, _), unit in found.items()}
    for key in keys:
        _, path, line, is_backward = key
        if is_backward and path in inner:
            found[key] = _unit(key, inner, root)
        elif is_backward and (path, line) in lines:
            found[key] = lines[path, line]
    return found


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
