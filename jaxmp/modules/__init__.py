"""Policies applied to Flax modules, linen and nnx. Imports Flax."""

from jaxmp.modules._apply import apply_policy
from jaxmp.modules._describe import Description, Row, describe
from jaxmp.modules._variables import cast_for_eval, cast_like

__all__ = [
    "apply_policy",
    "describe",
    "Description",
    "Row",
    "cast_for_eval",
    "cast_like",
]
