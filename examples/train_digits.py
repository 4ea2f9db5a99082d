"""Trains a small CNN on handwritten digits in float32, float16 and bfloat16.

    python examples/train_digits.py
    python examples/train_digits.py --policy mixed_float16 --steps 200
    python examples/train_digits.py --resume        # after Ctrl-C, or a crash

The model is plain Flax nnx without a dtype in it. The images come with scikit-learn.
Only `apply_policy` and `loss_scaling` are about precision.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from runner import Experiment, Training, half_policy, run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxmp

BATCH, LEARNING_RATE = 64, 3e-3


class CNN(nnx.Module):
    """Three convolutions with BatchNorm; it knows nothing about precision."""

    def __init__(self, rngs: nnx.Rngs):
        sizes = [(1, 16), (16, 32), (32, 64)]
        self.convs = nnx.List(
            nnx.Conv(before, after, (3, 3), use_bias=False, rngs=rngs)
            for before, after in sizes
        )
        self.norms = nnx.List(
            nnx.BatchNorm(after, momentum=0.9, rngs=rngs) for _, after in sizes
        )
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array, *, evaluate: bool = False) -> jax.Array:
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), use_running_average=evaluate))
            if x.shape[1] > 2:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.head(x.mean(axis=(1, 2)))


State = tuple[CNN, nnx.Optimizer]


def train_step(
    state: State, batch: tuple[jax.Array, jax.Array]
) -> tuple[State, dict[str, jax.Array]]:
    """One step; one that overflows moves neither weights nor BatchNorm statistics."""
    model, optimizer = state
    images, labels = batch

    def loss_fn(model: CNN) -> jax.Array:
        logits = model(images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    scale = jaxmp.get_loss_scale(optimizer)
    # A copy: what nnx.state returns moves with the model.
    before = nnx.clone(nnx.state(model, nnx.BatchStat))
    value_and_grad = jaxmp.value_and_grad(loss_fn, transform=nnx.value_and_grad)
    loss, grads = value_and_grad(model, loss_scale=optimizer)
    optimizer.update(model, grads, value=loss)
    after = nnx.state(model, nnx.BatchStat)
    nnx.update(model, jaxmp.select_applied(optimizer, after, before))
    applied = jaxmp.loss_scale_metrics(optimizer)["grads_finite"]
    return state, {"loss": loss, "loss_scale": scale, "applied": applied}


def load_images(seed: int) -> list[np.ndarray]:
    """Images in [0, 1], four fifths to train on and a fifth held out; their labels."""
    digits: Any = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    return train_test_split(
        images, digits.target, test_size=0.2, random_state=seed, stratify=digits.target
    )


def prepare(policy: jaxmp.Policy, args: argparse.Namespace) -> Training:
    """The model, the data and the step of one run, all made from the seed."""
    images, test_images, labels, test_labels = load_images(args.seed)
    model = jaxmp.apply_policy(CNN(nnx.Rngs(args.seed)), policy)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, args.steps))
    tx = jaxmp.loss_scaling(optimizer, policy, growth_interval=args.growth_interval)
    state = model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        # A function of the seed and the step: a resumed run sees the same batches.
        generator = np.random.default_rng((args.seed, step))
        chosen = generator.choice(len(images), BATCH, replace=False)
        return images[chosen], labels[chosen]

    def evaluate(state: State, *, in_half: bool = False) -> float:
        model, _ = state
        if in_half:  # parameters cast once, the whole forward in half precision
            model = jaxmp.cast_for_eval(model, half_policy(policy))
        logits = model(test_images, evaluate=True)
        return float((np.argmax(logits, axis=-1) == test_labels).mean())

    return Training(
        state,
        train_step,
        batch,
        evaluate,
        params=lambda state: nnx.state(state[0], nnx.Param),
    )


def describe(args: argparse.Namespace) -> str:
    images, test_images, *_ = load_images(args.seed)
    return f"{len(images)} images to train on, {len(test_images)} to test."


EXPERIMENT = Experiment(
    script=__file__,
    prepare=prepare,
    describe=describe,
    score="test accuracy",
    steps=300,
    growth_interval=20,
)

if __name__ == "__main__":
    run(EXPERIMENT)
