"""Mixed-precision training for JAX, Flax and Optax.

`jaxmp.get_policy("mixed_bfloat16")` names the dtypes. `jaxmp.loss_scaling(optimizer,
policy)` skips non-finite steps and adapts the loss scale.
`jaxmp.value_and_grad(loss_fn)` returns true losses and true gradients at any loss
scale. Everything is a pure function of pytrees.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmp import errors, loss_scale, optimizers, policy, sharding
from jaxmp._jaxpr import versions as versions  # checks the version of JAX
from jaxmp.loss_scale import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    all_finite,
    dynamic_loss_scaling,
    get_loss_scale,
    grad,
    loss_scale_metrics,
    loss_scaling,
    raise_if_collapsed,
    retry,
    scale_loss,
    select_applied,
    select_tree,
    static_loss_scaling,
    value_and_grad,
)
from jaxmp.optimizers import (
    accumulate,
    cast_state,
    check_dtypes,
    master_weights,
    overwrite_with_gradient,
    stochastic_round,
    stochastic_rounding,
)
from jaxmp.policy import (
    Policy,
    PolicyRule,
    cast_to_full,
    cast_to_half,
    default_rules,
    get_policy,
    half_dtype,
    head_in_float32,
)
from jaxmp.policy.dtypes import dtype_to_names as dtype_to_names  # jmp's tests read it

if TYPE_CHECKING:
    from jaxmp import casting, modules, numerics, report, testing, training
    from jaxmp.casting import (
        autocast,
        explain,
        full_precision,
        half_operands,
        register_rule,
    )
    from jaxmp.modules import apply_policy, cast_for_eval, describe
    from jaxmp.training import TrainState

__version__ = "0.2.0"

__all__ = [
    # policies
    "Policy",
    "get_policy",
    "half_dtype",
    "cast_to_full",
    "cast_to_half",
    # policies for Flax modules
    "apply_policy",
    "PolicyRule",
    "default_rules",
    "head_in_float32",
    "describe",
    "cast_for_eval",
    # autocast
    "autocast",
    "explain",
    "full_precision",
    "half_operands",
    "register_rule",
    # gradients
    "value_and_grad",
    "grad",
    "retry",
    "scale_loss",
    # loss scales as Optax transformations
    "loss_scaling",
    "dynamic_loss_scaling",
    "static_loss_scaling",
    "get_loss_scale",
    "loss_scale_metrics",
    "select_applied",
    "raise_if_collapsed",
    # optimizers
    "master_weights",
    "overwrite_with_gradient",
    "cast_state",
    "accumulate",
    "stochastic_rounding",
    "stochastic_round",
    "check_dtypes",
    # the loss scales of jmp
    "LossScale",
    "NoOpLossScale",
    "StaticLossScale",
    "DynamicLossScale",
    "all_finite",
    "select_tree",
    # training
    "TrainState",
    # subpackages
    "casting",
    "errors",
    "loss_scale",
    "optimizers",
    "policy",
    "sharding",
    "modules",
    "numerics",
    "report",
    "testing",
    "training",
]


# Autocast and Flax take longer to import than everything else here, and optimizers do
# without.
_IMPORTED_ON_DEMAND = {
    "casting",
    "modules",
    "numerics",
    "report",
    "testing",
    "training",
}
_PACKAGE_OF = {
    "autocast": "jaxmp.casting",
    "explain": "jaxmp.casting",
    "full_precision": "jaxmp.casting",
    "half_operands": "jaxmp.casting",
    "register_rule": "jaxmp.casting",
    "apply_policy": "jaxmp.modules",
    "cast_for_eval": "jaxmp.modules",
    "describe": "jaxmp.modules",
    "TrainState": "jaxmp.training",
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_ON_DEMAND:
        return importlib.import_module(f"jaxmp.{name}")
    if name in _PACKAGE_OF:
        return getattr(importlib.import_module(_PACKAGE_OF[name]), name)
    raise AttributeError(f"module 'jaxmp' has no attribute {name!r}")
