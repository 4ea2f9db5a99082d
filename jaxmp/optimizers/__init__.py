"""Optax transformations for training in half precision: what is stored, and how."""

from jaxmp.optimizers._accumulation import accumulate
from jaxmp.optimizers._check_dtypes import check_dtypes
from jaxmp.optimizers._ema import ema, get_ema
from jaxmp.optimizers._lint import lint_optimizer
from jaxmp.optimizers._master_access import (
    check_master_weights,
    get_master_weights,
    load_master_weights,
)
from jaxmp.optimizers._master_weights import master_weights
from jaxmp.optimizers._overwrite_with_gradient import overwrite_with_gradient
from jaxmp.optimizers._state_dtype import cast_state
from jaxmp.optimizers._stochastic_rounding import stochastic_round, stochastic_rounding

__all__ = [
    "master_weights",
    "get_master_weights",
    "load_master_weights",
    "check_master_weights",
    "cast_state",
    "accumulate",
    "overwrite_with_gradient",
    "stochastic_rounding",
    "stochastic_round",
    "ema",
    "get_ema",
    "check_dtypes",
    "lint_optimizer",
]
