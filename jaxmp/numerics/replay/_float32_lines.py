"""Lines of a program that stay in float32, as if `full_precision` marked them."""

from collections.abc import Collection
from typing import NamedTuple

from jaxmp._jaxpr.marks import FULL_PRECISION_SCOPE
from jaxmp._jaxpr.rewrite import map_equations, map_held
from jaxmp._jaxpr.site import Site
from jaxmp._jaxpr.types import Eqn, Jaxpr


class Line(NamedTuple):
    """A line of a file."""

    file: str
    number: int


def keep_lines(jaxpr: Jaxpr, lines: Collection[Line]) -> Jaxpr:
    """Marks what some lines compute, and what they call, as `full_precision` does.

    Args:
      jaxpr: a traced program, before autocast.
      lines: which lines.

    Returns:
      The same program, in which autocast leaves these lines in float32.
    """

    def rewrite(jaxpr: Jaxpr, around: Site | None) -> Jaxpr:
        return map_equations(jaxpr, lambda eqn: marked(Site(eqn, around)))

    def marked(site: Site) -> Eqn:
        eqn, source = site.eqn, site.source
        if source is not None and Line(source.file, source.line) in lines:
            stack = eqn.source_info.name_stack.extend(FULL_PRECISION_SCOPE)
            return eqn.replace(source_info=eqn.source_info.replace(name_stack=stack))
        params = map_held(eqn.params, lambda jaxpr: rewrite(jaxpr, site))
        return eqn if params is eqn.params else eqn.replace(params=params)

    return rewrite(jaxpr, None)
