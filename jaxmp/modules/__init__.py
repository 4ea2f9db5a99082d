"""Policies for Flax modules, linen and nnx. Imports Flax."""

from jaxmp.modules._apply import apply_policy
from jaxmp.modules._describe import describe
from jaxmp.modules._description import Description
from jaxmp.modules._variables import cast_for_eval, cast_like

__all__ = [
    "apply_policy",
    "describe",
    "Description",
    "cast_for_eval",
    "cast_like",
]
