"""Reads the arguments of `TrainState.create`: one policy, one loss scale."""

import dataclasses
import difflib
import inspect
from typing import Any

import jax
import optax

from jaxmp._jaxpr.flax_internals import OVERWRITE_WITH_GRADIENT
from jaxmp.errors import (
    LossScalePolicyMismatch,
    PolicyError,
    TrainStateOptionError,
)
from jaxmp.loss_scale import LossScale, dynamic_loss_scaling, loss_scaling
from jaxmp.loss_scale.jmp_classes import of_jmp
from jaxmp.loss_scale.made_with import MadeWith, has_float16, notes
from jaxmp.loss_scale.state import find_all
from jaxmp.policy import Policy, PolicyLike, get_policy

_OPTIONS = tuple(
    name
    for function in (dynamic_loss_scaling, loss_scaling)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def read_policy(policy: PolicyLike) -> Policy:
    """Reads a policy, and says where a loss scale goes that was passed as one."""
    if isinstance(of_jmp(policy), LossScale):
        name = type(policy).__name__
        raise PolicyError(
            f"policy={name}(...) is a loss scale, and a train state saves its policy "
            "by name. Name the policy, and give the scale to the optimizer: "
            "TrainState.create(tx=loss_scaling(optimizer, scale), "
            "policy='mixed_float16', ...)"
        )
    return get_policy(policy)


def split_options(
    cls: type, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keywords into fields of a train state and options of its loss scale.

    Args:
      cls: the class of the train state, whose own fields win.
      kwargs: both together.

    Returns:
      The fields and the options.

    Raises:
      TrainStateOptionError: for a keyword that is neither.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    fields = {name: x for name, x in kwargs.items() if name in names}
    options = {name: x for name, x in kwargs.items() if name not in names}
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, (*names, *_OPTIONS), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TrainStateOptionError(
                f"{name!r} is neither a field of {cls.__name__} nor an option of "
                f"loss_scaling.{hint} Fields: {', '.join(names)}. Options: "
                f"{', '.join(dict.fromkeys(_OPTIONS))}."
            )
    return fields, options


def with_loss_scale(
    tx: optax.GradientTransformation,
    params: Any,
    policy: Policy,
    options: dict[str, Any],
) -> Any:
    """Wraps an optimizer with the loss scale of a policy, unless it has one.

    Args:
      tx: an Optax transformation.
      params: pytree of the parameters that it trains.
      policy: policy of the train state.
      options: options of `loss_scaling`.

    Raises:
      LossScalePolicyMismatch: if `tx` has the scale of a policy that needs another.
      TrainStateOptionError: if there are options, and `tx` already has a scale.
    """
    # Shapes only: two optimizer states at once may not fit into memory.
    if not find_all(jax.eval_shape(tx.init, params)):
        return loss_scaling(tx, policy, **options)
    if options:
        name, value = next(iter(options.items()))
        raise TrainStateOptionError(
            f"{name}={value!r} was given to TrainState.create, and its optimizer "
            "already has a loss scale. Leave the scale to the train state, "
            f"TrainState.create(tx=optimizer, policy=..., {name}={value!r}), or pass "
            f"the option where the scale is made: loss_scaling(optimizer, policy, "
            f"{name}={value!r})."
        )
    for scale in notes(tx):
        _check_policy(scale, policy)
    return tx


def trained_part(tree: Any) -> Any:
    """The parameters or gradients in variables that hold FP8 metadata beside them."""
    return tree["params"] if has_fp8_metadata(tree) else tree


def has_fp8_metadata(tree: Any) -> bool:
    """Whether these are variables with scales and histories of FP8 beside the rest."""
    return hasattr(tree, "keys") and OVERWRITE_WITH_GRADIENT in tree


def _check_policy(scale: MadeWith, policy: Policy) -> None:
    if scale.policy is None or has_float16(scale.policy) == has_float16(policy):
        return
    raise LossScalePolicyMismatch(
        f"The optimizer has the loss scale of the policy {str(scale.policy)!r}, "
        f"{_described(scale.policy)}, and the train state has the policy "
        f"{str(policy)!r}, which needs {_described(policy)}. Name the policy once: "
        "TrainState.create(tx=optimizer, policy=...) makes the scale itself. To choose "
        "a scale that differs from the policy's, make it without a policy: "
        "dynamic_loss_scaling(optimizer), static_loss_scaling(optimizer, 1024) or "
        "loss_scaling(optimizer, jaxmp.NoOpLossScale())."
    )


def _described(policy: Policy) -> str:
    return "a dynamic one" if has_float16(policy) else "the constant 1"
