"""Trains a small GPT in float32, float16 and bfloat16 and compares the three.

    python examples/train_lm.py
    python examples/train_lm.py --policy mixed_float16 --steps 200
    python examples/train_lm.py --resume        # after Ctrl-C, or a crash
    python -m jaxmp report examples/train_lm.py:make_step --target h100

The model is plain Flax linen without a dtype in it. The text is the reference that
comes with every Python. Only `apply_policy` and `TrainState` are about precision.
"""

import argparse
import functools
import pydoc_data.topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from runner import Experiment, Training, half_policy, read_flags, run

import jaxmp

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 2, 4, 64, 16
LEARNING_RATE = 4e-3


class Block(nn.Module):
    """A transformer block that normalises before each half."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(normed, mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class GPT(nn.Module):
    """A language model; it knows nothing about precision."""

    vocabulary: int
    context: int = CONTEXT
    width: int = WIDTH
    layers: int = LAYERS

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[-1])[None]
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(self.context, self.width)(positions)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = Block()(x, mask)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def mean_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return losses.mean()


def train_step(
    state: jaxmp.TrainState, windows: jax.Array
) -> tuple[jaxmp.TrainState, dict[str, jax.Array]]:
    """One step on windows of CONTEXT + 1 characters; skipped if it overflows."""
    tokens, following = windows[:, :-1], windows[:, 1:]

    def loss_fn(params: dict) -> jax.Array:
        return mean_loss(state.apply_fn({"params": params}, tokens), following)

    scale = jaxmp.get_loss_scale(state)
    loss, grads = state.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads, value=loss)
    applied = jaxmp.loss_scale_metrics(state)["grads_finite"]
    return state, {"loss": loss, "loss_scale": scale, "applied": applied}


def reference_text(seed: int) -> str:
    """Python's own reference, its topics shuffled by the seed.

    Topics quote each other. Only the first copy of a paragraph is kept, so that no
    held-out paragraph is trained on.
    """
    names = sorted(pydoc_data.topics.topics)
    np.random.default_rng(seed).shuffle(names)
    pages = "\n\n".join(pydoc_data.topics.topics[name] for name in names)
    return "\n\n".join(dict.fromkeys(pages.split("\n\n")))


@functools.cache
def load_text(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The text as integers: training part, held-out last tenth, size of vocabulary."""
    characters, tokens = np.unique(list(reference_text(seed)), return_inverse=True)
    tokens = tokens.astype(np.int32)
    border = len(tokens) * 9 // 10
    return tokens[:border], tokens[border:], len(characters)


Array = np.ndarray | jax.Array


def windows_at(tokens: Array, starts: Array, context: int = CONTEXT) -> Array:
    """Windows of `context` + 1 characters, one for each start."""
    return tokens[starts[:, None] + np.arange(context + 1)[None]]


def entropy_of_characters(tokens: np.ndarray) -> float:
    """The loss of a model that knows only how frequent each character is."""
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return -(shares * np.log(shares)).sum()


def held_out_loss(model: nn.Module, params: dict, tokens: np.ndarray) -> float:
    starts = np.arange(0, len(tokens) - CONTEXT, CONTEXT)
    batches = windows_at(tokens, starts[: len(starts) // BATCH * BATCH])
    batches = batches.reshape(-1, BATCH, CONTEXT + 1)

    def loss(params: dict, windows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, windows[:, :-1])
        return mean_loss(logits, windows[:, 1:])

    losses = jax.jit(lambda params: jax.lax.map(lambda w: loss(params, w), batches))
    return float(losses(params).mean())


def prepare(policy: jaxmp.Policy, args: argparse.Namespace) -> Training:
    """The model, the data and the step of one run, all made from the seed."""
    return training_from(new_state(policy, args), policy, args)


def make_model(policy: jaxmp.Policy, args: argparse.Namespace) -> nn.Module:
    return jaxmp.apply_policy(GPT(load_text(args.seed)[2]), policy)


def new_state(policy: jaxmp.Policy, args: argparse.Namespace) -> jaxmp.TrainState:
    """The state before the first step."""
    model = make_model(policy, args)
    learning_rate = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, args.steps // 10, args.steps, LEARNING_RATE / 10
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.01)
    )
    example = jnp.zeros((1, CONTEXT), jnp.int32)
    params = model.init(jax.random.key(args.seed), example)["params"]
    return jaxmp.TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=jaxmp.loss_scaling(optimizer, policy, growth_interval=args.growth_interval),
        policy=policy,
    )


def training_from(
    state: jaxmp.TrainState, policy: jaxmp.Policy, args: argparse.Namespace
) -> Training:
    """The run that begins with a state."""
    text, held_out, _ = load_text(args.seed)
    model = make_model(policy, args)

    def batch(step: int) -> Array:
        # A function of the seed and the step: a resumed run sees the same batches.
        generator = np.random.default_rng((args.seed, step))
        return windows_at(text, generator.integers(len(text) - CONTEXT, size=BATCH))

    def evaluate(state: jaxmp.TrainState, *, in_half: bool = False) -> float:
        if in_half:  # parameters cast once, the whole forward in half precision
            half = half_policy(policy)
            params = jaxmp.cast_for_eval(state.params, half)
            return held_out_loss(jaxmp.apply_policy(model, half), params, held_out)
        return held_out_loss(model, state.params, held_out)

    return Training(state, train_step, batch, evaluate, params=lambda s: s.params)


def describe(args: argparse.Namespace) -> str:
    text, held_out, vocabulary = load_text(args.seed)
    return (
        f"{len(text)} characters to train on, {len(held_out)} held out, {vocabulary} "
        "different ones. Loss of knowing only their frequencies: "
        f"{entropy_of_characters(held_out):.3f}."
    )


EXPERIMENT = Experiment(
    script=__file__,
    prepare=prepare,
    describe=describe,
    score="validation loss",
    steps=600,
    growth_interval=40,
)


def make_step(policy: str) -> tuple[object, ...]:
    """The step and its arguments, as `python -m jaxmp` takes them."""
    training = prepare(jaxmp.get_policy(policy), read_flags(EXPERIMENT, []))
    step = jax.jit(training.train_step, donate_argnums=0)
    return step, training.state, training.batch(0)


if __name__ == "__main__":
    run(EXPERIMENT)
