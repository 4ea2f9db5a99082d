"""The language model of `examples/train_lm.py` in float16, for benchmarks."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmp

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import train_lm

POLICY = "mixed_float16"


def make_state(
    wrap: Callable[[Any], Any] = lambda tx: tx, **scaling: Any
) -> tuple[jaxmp.TrainState, np.ndarray]:
    """Makes the first state, and loads the text that it is trained on.

    Args:
      wrap: takes and returns the optimizer, loss scale included.
      **scaling: keyword arguments of `jaxmp.loss_scaling`.
    """
    text, _, vocabulary = train_lm.load_text(seed=0)
    model = jaxmp.apply_policy(train_lm.GPT(vocabulary), POLICY)
    example = jnp.zeros((1, train_lm.CONTEXT), jnp.int32)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(train_lm.LEARNING_RATE)
    )
    state = jaxmp.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), example)["params"],
        tx=wrap(jaxmp.loss_scaling(optimizer, POLICY, **scaling)),
        policy=POLICY,
    )
    return state, text


def batches(text: np.ndarray, count: int) -> list[train_lm.Array]:
    """The first batches of windows, at random places of the text."""
    generator = np.random.default_rng(0)
    return [
        train_lm.windows_at(
            text, generator.integers(len(text) - train_lm.CONTEXT, size=train_lm.BATCH)
        )
        for _ in range(count)
    ]
