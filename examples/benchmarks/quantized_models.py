"""The models and data of `quantized_losses.py`, plain Flax without a dtype."""

import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxmp

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import train_digits
import train_lm

Batch = tuple[train_lm.Array, train_lm.Array]
"""Inputs, and the classes to predict."""

Rules = tuple[jaxmp.PolicyRule, ...]

EXPERTS = 4
PATCH = 4


class Job(NamedTuple):
    """What is trained.

    Attributes:
      seed: of weights and batches.
      model: maps inputs to logits.
      batch: the batch of a step.
      held_out: batches that are never trained on, stacked.
      rules: the rules of `apply_policy` under a policy.
    """

    seed: int
    model: nn.Module
    batch: Callable[[int], Batch]
    held_out: Batch
    rules: Callable[[jaxmp.Policy], Rules] = lambda policy: jaxmp.default_rules


def language_model(seed: int) -> Job:
    """The model of `train_lm.py` and its text, of which all seeds hold out the same."""
    text, held_out, vocabulary = train_lm.load_text(seed=0)
    context, size = train_lm.CONTEXT, train_lm.BATCH

    def batch(step: int) -> Batch:
        generator = np.random.default_rng((seed, step))
        starts = generator.integers(len(text) - context, size=size)
        return _shifted(train_lm.windows_at(text, starts))

    starts = np.arange(0, len(held_out) - context, context)
    windows = train_lm.windows_at(held_out, starts[: len(starts) // size * size])
    stacked = _shifted(windows.reshape(-1, size, context + 1))
    return Job(seed, train_lm.GPT(vocabulary), batch, stacked)


def _shifted(windows: train_lm.Array) -> Batch:
    return windows[..., :-1], windows[..., 1:]


class Experts(nn.Module):
    """A mixture of experts: each token goes to one, as long as that has room."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])
        width, hidden = tokens.shape[-1], 2 * tokens.shape[-1]
        capacity = 2 * len(tokens) // EXPERTS
        init = nn.initializers.lecun_normal(batch_axis=0)
        router = self.param("router", nn.initializers.normal(0.02), (width, EXPERTS))
        expand = self.param("expand", init, (EXPERTS, width, hidden))
        reduce = self.param("reduce", init, (EXPERTS, hidden, width))

        gate, slot, balance = route(tokens, router, capacity)
        self.sow("balance", "loss", balance)
        inputs = jnp.zeros((EXPERTS * capacity, width), tokens.dtype)
        inputs = inputs.at[slot].set(tokens, mode="drop")
        inputs = inputs.reshape(EXPERTS, capacity, width)
        active = nn.gelu(jnp.einsum("ecd,edf->ecf", inputs, expand))
        outputs = jnp.einsum("ecf,efd->ecd", active, reduce).reshape(-1, width)
        chosen = outputs.at[slot].get(mode="fill", fill_value=0)
        return (gate[:, None] * chosen).reshape(x.shape)


@jaxmp.full_precision
def route(
    tokens: jax.Array, router: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses an expert for each token, in float32.

    Args:
      tokens: (tokens, width).
      router: (width, experts).
      capacity: how many tokens an expert takes; those that come later pass it by.

    Returns:
      The expert's probability; the token's place among those of all experts, or one
      behind them; what is 1 if all experts are equally busy (Fedus et al. 2021).
    """
    probabilities = jax.nn.softmax(tokens @ router)
    expert = probabilities.argmax(-1)
    chosen = jax.nn.one_hot(expert, EXPERTS)
    place = (jnp.cumsum(chosen, 0) * chosen).sum(-1).astype(jnp.int32) - 1
    slot = jnp.where(place < capacity, expert * capacity + place, EXPERTS * capacity)
    balance = EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum()
    return probabilities.max(-1), slot, balance


class ExpertsBlock(nn.Module):
    """A transformer block whose second half is a mixture of experts."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(train_lm.HEADS)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        return x + Experts()(nn.LayerNorm()(x))


class ExpertsGPT(train_lm.GPT):
    """The language model with mixtures of experts."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[-1])[None]
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(self.context, self.width)(positions)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = ExpertsBlock()(x, mask)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def mixture_of_experts(seed: int) -> Job:
    """The same text and batches for a mixture of experts."""
    job = language_model(seed)
    model = ExpertsGPT(train_lm.load_text(seed=0)[2])
    return job._replace(model=model, rules=quantized_experts)


def quantized_experts(policy: jaxmp.Policy) -> Rules:
    """With a rule for experts: batches of matmuls are left in half by default."""
    if policy.quantize is None:
        return jaxmp.default_rules
    rule = jaxmp.PolicyRule(module_type=Experts, quantize=policy.quantize)
    return (rule, *jaxmp.default_rules)


class PatchTransformer(nn.Module):
    """Classifies images from their patches, with the blocks of the language model."""

    classes: int = 10
    width: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        side = images.shape[1] // PATCH
        shape = (-1, side, PATCH, side, PATCH)
        patches = images.reshape(shape).swapaxes(2, 3).reshape(-1, side**2, PATCH**2)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, side**2, self.width)
        )
        x = nn.Dense(self.width)(patches) + positions
        for _ in range(self.layers):
            x = train_lm.Block()(x, None)
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(1))


def digits(seed: int) -> Job:
    """The images and batches of `train_digits.py` for a transformer over patches."""
    images, test_images, labels, test_labels = train_digits.load_images(seed=0)
    size = train_digits.BATCH

    def batch(step: int) -> Batch:
        generator = np.random.default_rng((seed, step))
        chosen = generator.choice(len(images), size, replace=False)
        return images[chosen], labels[chosen]

    count = len(test_labels) // size
    stacked = tuple(
        x[: count * size].reshape(count, size, *x.shape[1:])
        for x in (test_images, test_labels)
    )
    return Job(seed, PatchTransformer(), batch, stacked)


JOBS: dict[str, Callable[[int], Job]] = {
    "lm": language_model,
    "moe": mixture_of_experts,
    "digits": digits,
}
"""Makes a job from its seed."""
