"""Refuses functions whose nnx modules would lose their state under autocast."""

import dis
import sys
import types
from typing import Any

from jaxmp.errors import AutocastError


def check_function(fn: Any) -> None:
    """Refuses what would lose its state: nnx modules that are not arguments."""
    if not callable(fn):
        raise AutocastError(
            f"autocast takes a function, not {fn!r}. Write autocast(fn, policy)."
        )
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    for name, value in _closed_over(fn):
        if isinstance(value, nnx.Module):
            shown = getattr(fn, "__name__", type(fn).__name__)
            raise AutocastError(
                f"{shown!r} closes over {name!r}, an nnx {type(value).__name__}, and "
                "what it writes to it would be lost. "
                "Pass the module as an argument: "
                "autocast(lambda model, x: model(x))(model, x)."
            )


def _closed_over(fn: Any) -> list[tuple[str, Any]]:
    found = []
    if getattr(fn, "__self__", None) is not None:
        found.append(("self", fn.__self__))
    found.append(("itself", fn))
    code = getattr(fn, "__code__", None)
    if code is None:
        return found
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not filled yet
            continue
    scope, names = fn.__globals__, _global_names(code)
    return found + [(name, scope[name]) for name in names if name in scope]


def _global_names(code: types.CodeType) -> list[str]:
    """The globals that a function reads; `co_names` has attributes, too."""
    read = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
    return sorted(read)
