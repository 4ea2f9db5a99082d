"""Loss scaling: gradients under a scale, and an Optax transformation that adapts it."""

from jaxmp._tree import all_finite
from jaxmp.loss_scale._access import (
    get_loss_scale,
    inner_state,
    loss_scale_metrics,
    scale_loss,
    select_applied,
)
from jaxmp.loss_scale._collapse import raise_if_collapsed
from jaxmp.loss_scale._gradients import grad, value_and_grad
from jaxmp.loss_scale._retry import retry
from jaxmp.loss_scale._transform import (
    dynamic_loss_scaling,
    loss_scaling,
    static_loss_scaling,
)
from jaxmp.loss_scale.jmp_classes import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    select_tree,
)

__all__ = [
    "value_and_grad",
    "grad",
    "retry",
    "loss_scaling",
    "dynamic_loss_scaling",
    "static_loss_scaling",
    "get_loss_scale",
    "inner_state",
    "scale_loss",
    "loss_scale_metrics",
    "select_applied",
    "raise_if_collapsed",
    "all_finite",
    "select_tree",
    "LossScale",
    "NoOpLossScale",
    "StaticLossScale",
    "DynamicLossScale",
]
