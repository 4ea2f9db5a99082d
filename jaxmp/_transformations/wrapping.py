"""What every optimizer wrapper does: float32 inside, and a state of fixed dtypes."""

from typing import Any

import jax
import optax

from jaxmp import _tree
from jaxmp.errors import MissingParams

LOSS_SCALING_OUTERMOST = (
    "A loss scale goes outermost; anywhere else it misses the overflows that it has to "
    "react to: loss_scaling(master_weights(accumulate(optax.adamw(1e-3), 4)), policy)."
)
COPY_OR_RANDOM = (
    "Where a float32 copy is kept, nothing needs to be rounded at random. Use one of "
    "the two: master_weights(optax.adamw(1e-3)), or "
    "stochastic_rounding(optax.adamw(1e-3), seed=0)."
)
OWN_COLLECTION = "overwrite_with_gradient(collection=...)"
"""The name of that transformation if it looks for another collection than Flax's."""


def with_extra_args(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Makes any Optax transformation, even `optax.MultiSteps`, take extra arguments."""
    if hasattr(inner, "gradient_transformation"):
        inner = inner.gradient_transformation()
    return optax.with_extra_args_support(inner)


def float32_view(tree: Any) -> Any:
    """Widens float16 and bfloat16 leaves to float32."""
    return jax.tree.map(_tree.at_least_float32, tree)


def strong_state(state: Any) -> Any:
    """Gives every leaf of a first state the dtype that it will keep."""
    return jax.tree.map(_tree.strong, state)


def pinned(state: Any, reference: Any) -> Any:
    """Gives every leaf of a next state the dtype that it had before."""
    return jax.tree.map(_tree.like, state, reference)


def require_params(params: Any, name: str) -> None:
    """Raises unless `update` was given parameters."""
    if params is None:
        raise MissingParams(
            f"{name}() was updated without parameters, and needs them to know where "
            "its update lands. Call tx.update(grads, state, params)."
        )
