"""Lines of a program that stay in float32, as if `full_precision` marked them."""

from collections.abc import Collection
from typing import Any, NamedTuple

from jaxmp._jaxpr.sources import written
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.plan._plan import FULL_PRECISION_SCOPE


class Line(NamedTuple):
    """A line of a file."""

    file: str
    number: int


def keep_lines(jaxpr: Any, lines: Collection[Line]) -> Any:
    """Marks what some lines compute, and what they call, as `full_precision` does.

    Args:
      jaxpr: a traced program, before autocast.
      lines: which lines.

    Returns:
      The same program, in which autocast leaves these lines in float32.
    """

    def rewrite(jaxpr: Any, around: Line | None) -> Any:
        opened = open_jaxpr(jaxpr)
        eqns = [marked(eqn, around) for eqn in opened.eqns]
        opened = opened.replace(eqns=eqns)
        return jaxpr.replace(jaxpr=opened) if hasattr(jaxpr, "jaxpr") else opened

    def marked(eqn: Any, around: Line | None) -> Any:
        line = line_of(eqn) or around
        if line in lines:
            stack = eqn.source_info.name_stack.extend(FULL_PRECISION_SCOPE)
            return eqn.replace(source_info=eqn.source_info.replace(name_stack=stack))
        params = {name: inside(value, line) for name, value in eqn.params.items()}
        return eqn.replace(params=params)

    def inside(value: Any, line: Line | None) -> Any:
        if hasattr(value, "eqns"):
            return rewrite(value, line)
        if type(value) is tuple and any(hasattr(item, "eqns") for item in value):
            return tuple(inside(item, line) for item in value)
        return value

    return rewrite(jaxpr, None)


def line_of(eqn: Any) -> Line | None:
    """The user's line that an equation was traced in, None if there is none."""
    source = written(eqn.source_info.traceback).source
    return None if source is None else Line(source.file, source.line)
