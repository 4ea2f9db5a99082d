"""What a model is trained on and how, whatever the precision."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Job(NamedTuple):
    """How a model is made, fed, judged and updated.

    Attributes:
      model: makes the model; takes `dtype=`, which is None except for dtypes by hand.
      batch: takes a key; returns the inputs of the model, and labels.
      loss: takes what the model returns, and labels.
      optimizer: updates the parameters.
      shape: the batch and the optimizer in words.
    """

    model: Callable[..., nn.Module]
    batch: Callable[[jax.Array], tuple[tuple[jax.Array, ...], Any]]
    loss: Callable[[jax.Array, Any], jax.Array]
    optimizer: optax.GradientTransformation
    shape: str


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each label, in float32 whatever the logits are."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return cross_entropy(logits, labels).mean()
