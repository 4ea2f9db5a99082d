"""The blocks of layers that are left in half, found by the paths of their matmuls."""

from collections.abc import Iterator

from jaxmp._jaxpr.calls import held
from jaxmp._jaxpr.marks import scopes
from jaxmp._jaxpr.primitives import MATMULS
from jaxmp._jaxpr.scopes import is_backward, layer_path
from jaxmp._jaxpr.types import Jaxpr
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.policy.blocks import outer_blocks, warn_of_no_blocks


def half_blocks(jaxpr: Jaxpr, blocks: int) -> frozenset[str]:
    """The paths of the first and the last blocks; warns if there are none.

    Args:
      jaxpr: of a whole function.
      blocks: how many of the first, and of the last.
    """
    paths = set(_paths(jaxpr))
    found = outer_blocks(paths, blocks)
    if paths and not found:
        warn_of_no_blocks(paths)
    return found


def _paths(jaxpr: Jaxpr, around: tuple[str, ...] = ()) -> Iterator[str]:
    for eqn in open_jaxpr(jaxpr).eqns:
        if is_backward(eqn):
            continue
        path = around + scopes(eqn)
        if eqn.primitive.name in MATMULS:
            yield layer_path(path)
        for inner in held(eqn):
            yield from _paths(inner, path)
