"""Reports a half policy that changes nothing, or little.

A policy that leaves a model in float32 seems to work: the losses are right, and only
the machine's bill is not.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmp import _tree, _warnings
from jaxmp.casting.explanation.shares import shares_of
from jaxmp.casting.plan.plan import JaxprPlan
from jaxmp.casting.quantized.formats import warn_if_nothing
from jaxmp.errors import MostlyFloat32Warning, PolicyWithoutEffect
from jaxmp.modules._layers import Application, Origin
from jaxmp.policy import default_rules


class Leaf(NamedTuple):
    """One of Flax's layers, as it computes under a policy.

    Attributes:
      type: name of its class.
      origin: who decided its dtype.
      dtype: dtype that it computes in.
      size: number of its parameters.
    """

    type: str
    origin: Origin
    dtype: np.dtype
    size: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether its author keeps it out of half precision."""
        return self.origin is Origin.AUTHOR and self.dtype not in _tree.HALF


def check_plan(
    plan: JaxprPlan, leaves: Mapping[str, Leaf], name: str, application: Application
) -> None:
    """Raises if a half policy leaves every matmul of a model in float32.

    Args:
      plan: plan of a whole call of the model.
      leaves: its layers, by path.
      name: name of the model's class.
      application: the policy and its options.
    """
    warn_if_nothing(plan, application.policy.quantize, name)
    if _is_by_rule(leaves, application):
        return
    shares = shares_of(plan)
    if shares.half or not shares.total:
        return
    reasons = [
        f"{reason.reason}{f' at {reason.source}' if reason.source else ''}"
        for reason in shares.reasons[:3]
    ]
    _raise(name, application, leaves, reasons)


def check_leaves(
    leaves: Mapping[str, Leaf],
    name: str,
    application: Application,
    said: set[Any] | None = None,
) -> None:
    """Raises if every layer is kept in float32; warns if most parameters are.

    Args:
      leaves: the layers of a model that multiply or look up, by path.
      name: name of the model's class.
      application: the policy and its options.
      said: remembers the warnings, so that each is given once.
    """
    if application.policy.compute_dtype not in _tree.HALF or not leaves:
        return
    kept = {path: leaf for path, leaf in leaves.items() if leaf.is_kept}
    if len(kept) == len(leaves):
        _raise(name, application, leaves, [])
    size = sum(leaf.size for leaf in leaves.values())
    kept_size = sum(leaf.size for leaf in kept.values())
    said = set() if said is None else said
    if 2 * kept_size > size and frozenset(kept) not in said:
        said.add(frozenset(kept))
        _warnings.warn(
            f"{_shown(kept)} of {name} hold {kept_size / size:.0%} of its parameters "
            f"and stay in float32 under {str(application.policy)!r}. "
            f"{_repair(application)}",
            MostlyFloat32Warning,
        )


def _repair(application: Application) -> str:
    dtype = application.policy.compute_dtype
    return (
        "If this is not intended, apply_policy(model, policy, "
        "explicit_dtype='override') gives every layer the policy's dtype, and a rule "
        f"gives it to some: rules=[PolicyRule(path=..., compute='{dtype}')]."
    )


def _is_by_rule(leaves: Mapping[str, Leaf], application: Application) -> bool:
    """Whether a rule of the user's keeps a layer in float32.

    If the layers are not known, any rule of the user's that could do so counts.
    """
    if leaves:
        return any(
            leaf.origin is Origin.RULE and leaf.dtype not in _tree.HALF
            for leaf in leaves.values()
        )
    return any(
        rule.compute is not None and rule.compute not in _tree.HALF
        for rule in application.rules
        if rule not in default_rules
    )


def _raise(
    name: str,
    application: Application,
    leaves: Mapping[str, Leaf],
    reasons: list[str],
) -> None:
    kept = {path: leaf for path, leaf in leaves.items() if leaf.is_kept}
    if kept:
        was = "was" if len(kept) == 1 else "were"
        why = f"{_shown(kept)} {was} given dtype=float32 by the author"
        repair = _repair(application)
    else:
        why = "; ".join(reasons)
        repair = "Change what that line asks for, or leave the policy out."
    raise PolicyWithoutEffect(
        f"The policy {str(application.policy)!r} leaves every matmul of {name} in "
        f"float32: {why}. {repair}"
    )


def _shown(leaves: Mapping[str, Leaf]) -> str:
    first = [f"{path or 'the model'} ({leaf.type})" for path, leaf in leaves.items()]
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return ", ".join(first[:3]) + more
