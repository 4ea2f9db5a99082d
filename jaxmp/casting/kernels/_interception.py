"""Names that lead elsewhere while autocast traces.

Code calls a fused kernel by a name in a module or a class. Where such a name leads to a
function that is to be traced on half operands, it leads to a wrapper of the function
for as long as any thread traces, and to the function again afterwards. The wrapper
narrows operands only where autocast traces (`half_operands`): another thread that
calls it meanwhile gets the function as it is.
"""

import contextlib
import functools
import inspect
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmp.casting.kernels.half_operands import noting_float32, on_half, traced_for
from jaxmp.casting.ops import _half_functions
from jaxmp.casting.ops._half_functions import Function, Place
from jaxmp.casting.plan.plan import Settings

_INSTALLED = tuple(
    sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@contextlib.contextmanager
def tracing(settings: Settings, look: bool = True) -> Iterator[None]:
    """Around the tracing of what is planned next.

    Args:
      settings: of the plan.
      look: whether to look for names again; else those of the last trace are taken.
    """
    try:
        _names.enter(look)
        with traced_for(settings), noting_float32():
            yield
    finally:
        _names.leave()


def tracing_rule(settings: Settings) -> Any:
    """Around the tracing of a derivative rule, which happens after its function's."""
    return tracing(settings, look=False)


class _Names:
    """The names of known functions, and how many traces need them to lead elsewhere."""

    def __init__(self):
        self._lock = threading.RLock()
        self._traces = 0
        self._places: list[Place] = []
        # By id of the function, which is kept alive. Code that has got hold of a
        # wrapper keeps one that later traces know.
        self._wrappers: dict[int, tuple[Any, Any]] = {}
        # Libraries that held no known function, with what was looked for in them.
        self._without: dict[str, tuple[frozenset[int], int]] = {}

    def enter(self, look: bool) -> None:
        """Makes the names lead to wrappers."""
        with self._lock:
            self._traces += 1
            places = self._places if self._traces == 1 else []
            if look:
                places = self._look()
                self._places = places + (self._places if self._traces > 1 else [])
            for place in places:
                _lead(place, place.value, self._wrapper(place.value))

    def leave(self) -> None:
        """Makes them lead to the functions again, after the last trace."""
        with self._lock:
            self._traces -= 1
            if self._traces == 0:
                for place in self._places:
                    _lead(place, self._wrapper(place.value), place.value)

    def _wrapper(self, function: Any) -> Any:
        return self._wrappers[id(function)][1]

    def _look(self) -> list[Place]:
        """The names that lead to a function which is to be wrapped, and is not yet."""
        done = {id(place.value) for place in self._places if self._traces > 1}
        done |= {id(wrapper) for _, wrapper in self._wrappers.values()}
        places, imported = [], set()
        for function in _half_functions.known():
            place = _half_functions.find(function)
            if place is None or id(place.value) in done:
                continue
            if id(place.value) not in self._wrappers:
                self._wrappers[id(place.value)] = place.value, _wrap(function, place)
            if place.owner is not None:
                places.append(place)
            if function.is_imported and not inspect.isclass(place.owner):
                imported.add(id(place.value))
        return places + (self._held_by_modules(frozenset(imported)) if imported else [])

    def _held_by_modules(self, functions: frozenset[int]) -> list[Place]:
        """Every name of a module that leads to one of these functions, given by id.

        An installed library that held none is looked through again when it has grown.
        """
        places = []
        for key, module in list(sys.modules.items()):
            names = getattr(module, "__dict__", None)
            if not isinstance(names, dict):
                continue
            state = functions, len(names)
            if self._without.get(key) == state:
                continue
            values: Sequence[Any] = list(names.values())
            if not functions.isdisjoint(map(id, values)):
                found = [(n, x) for n, x in list(names.items()) if id(x) in functions]
                places += [Place(module, name, value) for name, value in found]
            elif str(names.get("__file__")).startswith(_INSTALLED):
                self._without[key] = state
        return places


_names = _Names()


def _wrap(function: Function, place: Place) -> Any:
    value = place.value
    takes_self = inspect.isclass(place.owner) and not isinstance(value, staticmethod)
    wrap = functools.partial(
        on_half,
        operands=function.operands,
        dtypes=function.dtypes,
        first=int(takes_self),
    )
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(wrap(value.__func__))
    return wrap(value)


def _lead(place: Place, old: Any, new: Any) -> None:
    """Makes a name lead to another function, unless it was given a value meanwhile."""
    if vars(place.owner).get(place.name) is not old:
        return
    if inspect.isclass(place.owner):
        setattr(place.owner, place.name, new)
    else:
        vars(place.owner)[place.name] = new
