"""Policies applied to Flax modules, linen and nnx. Imports Flax."""

from jaxmp.modules._apply import apply_policy

__all__ = ["apply_policy"]
