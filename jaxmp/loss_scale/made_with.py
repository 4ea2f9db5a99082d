"""The policy and machine that a loss scale was made with.

Its state is plain arrays, which do not show them. So the `init` of `loss_scaling`
carries them as an attribute, and is looked up in the closures of the transformations
around it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.errors import LossScaleOptionError
from jaxmp.loss_scale.jmp_classes import (
    DynamicLossScale,
    NoOpLossScale,
    StaticLossScale,
    of_jmp,
)
from jaxmp.loss_scale.state_machines import Machine, StaticMachine, dynamic_machine
from jaxmp.policy import Policy, get_policy

F = TypeVar("F", bound=Callable[..., Any])

_DEEPEST = 12


class MadeWith(NamedTuple):
    """How one loss scale of an optimizer was made.

    Attributes:
      policy: the policy that chose the scale; None if the user chose it directly.
      machine: how the scale moves.
    """

    policy: Policy | None
    machine: Machine


def read_made_with(policy_or_scale: Any, options: dict[str, Any]) -> MadeWith:
    """Reads the arguments of `loss_scaling`, and checks the options in every mode."""
    policy_or_scale = of_jmp(policy_or_scale)
    if _tree.is_array(policy_or_scale) and policy_or_scale.ndim == 0:
        policy_or_scale = policy_or_scale.item()
    if isinstance(policy_or_scale, DynamicLossScale):
        options = {**_options_of(policy_or_scale), **options}
    dynamic = dynamic_machine(options)
    match policy_or_scale:
        case bool():
            raise LossScaleOptionError(
                f"Expected a policy or a scale, not {policy_or_scale}. Use a policy "
                "such as 'mixed_float16', or a power of two."
            )
        case int() | float():
            return MadeWith(None, StaticMachine(policy_or_scale))
        case NoOpLossScale():
            return MadeWith(None, StaticMachine())
        case StaticLossScale():
            return MadeWith(None, StaticMachine(policy_or_scale.loss_scale))
        case DynamicLossScale():
            return MadeWith(None, dynamic)
    policy = get_policy(policy_or_scale)
    return MadeWith(policy, dynamic if has_float16(policy) else StaticMachine())


def _options_of(scale: DynamicLossScale) -> dict[str, Any]:
    return {
        "init_scale": float(scale.loss_scale),
        "growth_interval": scale.period,
        "growth_factor": scale.factor,
        "backoff_factor": 1 / scale.factor,
        "min_scale": scale.min_loss_scale,
    }


def has_float16(policy: Policy) -> bool:
    """Whether a policy needs a loss scale."""
    # A float16 parameter or output gets a float16 cotangent, whatever lies between.
    dtypes = (policy.param_dtype, policy.compute_dtype, policy.output_dtype)
    return jnp.float16 in dtypes


def note(init: F, made_with: MadeWith) -> F:
    """Attaches to the `init` of a transformation how its loss scale was made."""
    vars(init)["made_with"] = made_with
    return init


def notes(tx: Any) -> list[MadeWith]:
    """Lists how the loss scales of an optimizer were made, as far as closures show.

    Args:
      tx: an Optax transformation.

    Returns:
      One entry for each scale. Wrappers that make their transformations only in `init`,
      such as `optax.inject_hyperparams`, hide theirs.
    """
    return list(_search(tx.init, _DEEPEST, set()))


def _search(x: Any, depth: int, seen: set[int]) -> Iterator[MadeWith]:
    if id(x) in seen or depth == 0:
        return
    seen.add(id(x))
    found = getattr(x, "made_with", None)
    if isinstance(found, MadeWith):
        yield found
        return
    for part in _parts(x):
        yield from _search(part, depth - 1, seen)


def _parts(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list)):
        yield from x
    elif isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif callable(x):
        yield getattr(x, "__self__", None)
        yield getattr(x, "__wrapped__", None)
        for cell in getattr(x, "__closure__", None) or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not yet assigned
                continue
