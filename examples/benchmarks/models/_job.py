"""What a model is trained on and how, whatever the precision."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Job(NamedTuple):
    """How a model is made, fed, judged and updated."""

    model: Callable[..., nn.Module]
    """Takes `dtype=`, which is None except for dtypes by hand."""
    batch: Callable[[jax.Array], tuple[tuple[jax.Array, ...], Any]]
    """Takes a key; returns the inputs of the model, and labels."""
    loss: Callable[[Any, Any], jax.Array]
    """Takes what the model returns, and labels."""
    optimizer: optax.GradientTransformation
    shape: str
    """The batch in words."""


def cross_entropy(logits, labels):
    """Losses per label, in float32 whatever the logits are."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )
