"""In which format each matmul of a plan is multiplied, and why."""

import collections
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxmp import _warnings
from jaxmp._jaxpr.flops import matmul_shape
from jaxmp._jaxpr.marks import scopes
from jaxmp._jaxpr.scopes import layer_path
from jaxmp._jaxpr.site import Site
from jaxmp.casting.plan.plan import JaxprPlan, bodies_of
from jaxmp.errors import NothingQuantizedWarning


class MatmulFormat(NamedTuple):
    """A matmul in half under a policy that multiplies some in a smaller format.

    Attributes:
      path: name scopes and modules around it, the root left out.
      source: file, line and function of the user's code.
      recipe: the name of its recipe; empty if it is left in half.
      reason: why.
      shape: its sizes, as in `"(8192, 768) @ (768, 3072)"`.
      flops: what it costs, as often as it runs.
    """

    path: str
    source: str
    recipe: str
    reason: str
    shape: str
    flops: float


def formats_of(
    plan: JaxprPlan,
    path: tuple[str, ...] = (),
    times: int = 1,
    parent: Site | None = None,
) -> Iterator[MatmulFormat]:
    """The matmuls that might be in a smaller format, those in calls included."""
    for eqn in plan.eqns:
        around = path + scopes(eqn.eqn)
        site = Site(eqn.eqn, parent)
        if eqn.quantizing is not None:
            shape = matmul_shape(eqn.eqn)
            yield MatmulFormat(
                path=layer_path(around),
                source=str(site.line or ""),
                recipe=eqn.recipe.name if eqn.recipe else "",
                reason=eqn.quantizing.reason,
                shape=str(shape),
                flops=times * shape.flops,
            )
        count = times * eqn.eqn.params.get("length", 1)
        for body in bodies_of(eqn.call):
            yield from formats_of(body, around, count, site)


def totals(formats: Iterable[MatmulFormat]) -> dict[tuple[str, str], tuple[float, int]]:
    """FLOPs and number of the matmuls, by recipe and reason, the costliest first."""
    flops: dict[tuple[str, str], float] = collections.defaultdict(float)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for found in formats:
        key = found.recipe, found.reason
        flops[key] += found.flops
        counts[key] += 1
    ordered = sorted(flops, key=lambda key: -flops[key])
    return {key: (flops[key], counts[key]) for key in ordered}


def format_lines(formats: Iterable[MatmulFormat], total: float) -> tuple[str, ...]:
    """A line for each recipe, and for each reason to leave matmuls in half.

    Args:
      formats: of the matmuls.
      total: the FLOPs of which they are a share.
    """
    lines = []
    for (recipe, reason), (flops, count) in totals(formats).items():
        share = f"{flops / max(total, 1):.1%} of the FLOPs"
        matmuls = f"{count} matmul{'s' if count > 1 else ''}"
        what = f"in {reason}" if recipe else f"left in half: {reason}"
        lines.append(f"{share}, {matmuls}, {what}")
    return tuple(lines)


def warn_if_nothing(plan: JaxprPlan, quantize: str | None, name: str) -> None:
    """Warns if a policy was to quantise the matmuls of a function, and did none.

    Args:
      plan: of the whole function.
      quantize: the recipe that the policy names; None if it names none.
      name: what the user calls the function or the model.
    """
    if quantize is None:
        return
    formats = list(formats_of(plan))
    if not formats or any(found.recipe for found in formats):
        return
    lines = [
        f"{count} matmul{'s' if count > 1 else ''}: {reason}"
        for (_, reason), (_, count) in [*totals(formats).items()][:3]
    ]
    _warnings.warn(
        f"quantize={quantize} leaves every matmul of {name} in half: "
        f"{'; '.join(lines)}. A rule takes one all the same: "
        f"OpRule(path=..., quantize='{quantize}') for autocast, "
        f"PolicyRule(path=..., quantize='{quantize}') for apply_policy. "
        "Otherwise a half policy without quantize= computes the same.",
        NothingQuantizedWarning,
    )
