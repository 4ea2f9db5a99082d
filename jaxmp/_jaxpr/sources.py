"""Where in the user's code an equation of a jaxpr was written, and how."""

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

_JAXMP = os.path.dirname(os.path.dirname(__file__))
# Code that users call; a line in it would not help them.
_LIBRARIES = ("flax", "optax", "chex", "equinox", "haiku", "diffrax", "jaxlib")
_STANDARD = os.path.dirname(os.__file__)


class Source(NamedTuple):
    """A line of the user's code.

    Attributes:
      file: the file's whole path.
      line: number of the line, from 1.
      function: qualified name of the function around it.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} ({self.function})"

    @property
    def short(self) -> str:
        """The line with the function's own name: `"train.py:12 (loss_fn)"`."""
        return str(self._replace(function=self.function.rpartition(".")[2]))


class Written(NamedTuple):
    """How an equation came to be.

    Attributes:
      source: the user's line, or None if the traceback holds none.
      nearest: the innermost line outside JAX, the user's or a library's.
      instruction: number of the bytecode there, which tells apart what one line calls.
      library: the package whose code called JAX, None for the user's own.
      caller: name of the function that called JAX.
      inside_jax: names of JAX's own functions below it, innermost first.
      packages: every library on the stack.
    """

    source: Source | None
    nearest: Source | None
    instruction: int
    library: str | None
    caller: str
    inside_jax: tuple[str, ...]
    packages: frozenset[str]


def written(traceback: Any) -> Written:
    """Reads a traceback of `eqn.source_info`; None stands for an unknown one."""
    return _UNKNOWN if traceback is None else _written(traceback)


_UNKNOWN = Written(None, None, 0, None, "", (), frozenset())


@functools.lru_cache(maxsize=16384)
def _written(traceback: Any) -> Written:
    inside, nearest, source = [], None, None
    at = 0
    library: str | None = None
    packages = set()
    for file, frame, instruction in _frames(traceback):
        package = _package(file)
        packages.add(package)
        if package == "jax":
            if nearest is None:
                inside.append(frame.function_name)
            continue
        line = Source(file, frame.line_num, frame.function_name)
        if nearest is None:
            nearest, at, library = line, instruction, package
        if source is None and package is None:
            source = line
    packages.discard(None)
    caller = "" if nearest is None else nearest.function
    return Written(
        source, nearest, at, library, caller, tuple(inside), frozenset(packages)
    )


def is_users(file: str) -> bool:
    """Whether a file is neither Python's nor a library's."""
    return not file.startswith("<") and not _is_standard(file) and not _package(file)


def _frames(traceback: Any) -> Iterator[tuple[str, Any, int]]:
    _, instructions = traceback.raw_frames()
    for frame, instruction in zip(traceback.frames, instructions, strict=True):
        file = frame.file_name
        if not file.startswith("<frozen ") and not _is_standard(file):
            yield file, frame, instruction


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD) and "site-packages" not in file


@functools.lru_cache(maxsize=4096)
def _package(file: str) -> str | None:
    """The library that a file belongs to; of jaxmp, with the name of the package."""
    if file.startswith(_JAXMP):
        inside = file[len(_JAXMP) + 1 :].split(os.sep)[0]
        if inside == "testing":
            return None
        return "jaxmp" if inside.startswith("_") else f"jaxmp.{inside}"
    for name, root in _roots():
        if file.startswith(root):
            return name
    return None


def _roots() -> Iterator[tuple[str, str]]:
    yield "jax", os.path.dirname(jax.__file__) + os.sep
    for name in _LIBRARIES:
        module = sys.modules.get(name)
        for folder in getattr(module, "__path__", ()):
            yield name, folder + os.sep
