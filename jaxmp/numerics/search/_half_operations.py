"""Which operations a policy has in half."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxmp import _tree
from jaxmp._jaxpr.primitives import CAST, LAYOUT
from jaxmp._jaxpr.sources import Source
from jaxmp._jaxpr.types import Arrays
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._site import ReplaySite


class Key(NamedTuple):
    """What an operation is known by in every program of one function."""

    primitive: str
    path: str
    line: Source | None
    is_backward: bool


def key_of(site: ReplaySite) -> Key:
    """The key of an operation."""
    return Key(site.primitive, site.path, site.line, site.is_backward)


def find_half_operations(programs: Iterable[Program]) -> dict[Key, bool]:
    """The operations that are in half, and whether their operands are as well."""
    found: dict[Key, bool] = {}
    for program in programs:
        run = _HalfOperations()
        run.run_program(program)
        found.update(dict.fromkeys(run.handed_back, False))
        found.update(dict.fromkeys(run.whole, True))
    return found


class _HalfOperations(Interpreter):
    """Finds them in one program.

    Attributes:
      whole: those whose operands or results are in half.
      handed_back: those that compute in float32, and whose results are cast to half.
    """

    def __init__(self):
        super().__init__()
        self.whole: dict[Key, None] = {}
        self.handed_back: dict[Key, None] = {}
        self._producers: dict[int, tuple[Any, Key]] = {}

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        key = key_of(site)
        if site.primitive == CAST:
            ref, producer = self._producers.get(id(operands[0]), (lambda: None, key))
            if ref() is operands[0] and _tree.is_half(results[0]):
                self.handed_back[producer] = None
        elif site.primitive in LAYOUT:
            return
        elif any(map(_tree.is_half, (*operands, *results))):
            self.whole[key] = None
        else:
            for x in results:
                self._producers[id(x)] = weakref.ref(x), key
