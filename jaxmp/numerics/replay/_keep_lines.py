"""Lines of a program that stay in float32, as if `full_precision` marked them."""

from collections.abc import Collection
from typing import Any, NamedTuple

from jaxmp._jaxpr.marks import FULL_PRECISION_SCOPE
from jaxmp._jaxpr.rewrite import map_equations, map_held
from jaxmp._jaxpr.sources import written


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
        return map_equations(jaxpr, lambda eqn: marked(eqn, around))

    def marked(eqn: Any, around: Line | None) -> Any:
        line = line_of(eqn) or around
        if line in lines:
            stack = eqn.source_info.name_stack.extend(FULL_PRECISION_SCOPE)
            return eqn.replace(source_info=eqn.source_info.replace(name_stack=stack))
        params = map_held(eqn.params, lambda jaxpr: rewrite(jaxpr, line))
        return eqn if params is eqn.params else eqn.replace(params=params)

    return rewrite(jaxpr, None)


def line_of(eqn: Any) -> Line | None:
    """The user's line that an equation was traced in, None if there is none."""
    source = written(eqn.source_info.traceback).source
    return None if source is None else Line(source.file, source.line)
