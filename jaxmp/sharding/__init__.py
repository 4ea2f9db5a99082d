"""Many devices: weights gathered in half, gradients reduced in a dtype you choose."""

from jaxmp.sharding._gather import gather_weights
from jaxmp.sharding._processes import check_same_policy
from jaxmp.sharding._reduce import reduce_gradients
from jaxmp.sharding._replicated import replicated
from jaxmp.sharding._state import state_shardings

__all__ = [
    "gather_weights",
    "reduce_gradients",
    "replicated",
    "state_shardings",
    "check_same_policy",
]
