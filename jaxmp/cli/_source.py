"""Reads from a module's source what it defines, before a line of it is run."""

import ast
import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxmp.errors import InvalidStep

_MOST = 12


def check_source(module: str, name: str) -> None:
    """Refuses a name that a module does not define.

    A training script may train when it is imported, so its source is read first.

    Args:
      module: such as `"examples.train"` or `"examples/train.py"`.
      name: such as `"make_step"`.

    Raises:
      InvalidStep: listing the functions that are there; also for a file that does not
        exist. A module passes if its source is not found, or if it makes names while it
        runs.
    """
    path = _path(module)
    if path is None:
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # The import says what is wrong.
    defined = set(_defined(tree.body))
    first = name.partition(".")[0]
    if first in defined or _makes_names(tree):
        return
    functions = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    near = difflib.get_close_matches(first, sorted(defined), n=3)
    meant = f" Did you mean {', '.join(near)}?" if near else ""
    shown = ", ".join(functions[:_MOST]) or "none"
    more = f" and {len(functions) - _MOST} more" if len(functions) > _MOST else ""
    raise InvalidStep(
        f"{module} has no {first!r}.{meant} Its functions: {shown}{more}. Nothing was "
        "run."
    )


def _path(module: str) -> Path | None:
    if module.endswith(".py"):
        path = Path(module)
        if not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*.py"))[:_MOST]
            shown = ", ".join(near) or "none"
            raise InvalidStep(
                f"There is no file {module!r}. Files in {path.parent.resolve()} that "
                f"end in .py: {shown}."
            )
        return path
    for folder in (os.getcwd(), *sys.path):
        base = Path(folder or ".").joinpath(*module.split("."))
        for path in (base / "__init__.py", base.with_name(f"{base.name}.py")):
            if path.is_file():
                return path
    return None


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements bind, also in `if`, `try` and `with`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield (alias.asname or alias.name).partition(".")[0]
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id
        for part in ("body", "orelse", "finalbody"):
            yield from _defined(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _defined(handler.body)


def _makes_names(tree: ast.Module) -> bool:
    """Whether a module may bind names that its statements do not show."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            return True
        if isinstance(node, ast.Name) and node.id in ("globals", "exec", "setattr"):
            return True
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            return True
        if isinstance(node, ast.Global):
            return True
        if isinstance(node, (ast.Match, ast.NamedExpr)):
            return True
    return False
