"""Trains with matmuls in float8 and int8, and compares the held-out losses.

    python examples/benchmarks/quantized_losses.py --job lm
    python examples/benchmarks/quantized_losses.py --job moe --steps 300 --seeds 3
    python examples/benchmarks/quantized_losses.py --job lm --gradients

A seed gives every policy the same first weights and batches, so that a difference in
the loss is the policy's. Held-out losses are under the policy, too; the last but one
column evaluates the same weights in float32, and shows what training alone lost. The
CPU rounds to float8 and int8 exactly; how fast it does says nothing of an accelerator.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from quantized_models import JOBS, Batch, Job, Rules, train_lm

import jaxmp

POLICIES = (
    "float32",
    "mixed_bfloat16",
    "mixed_fp8",
    "mixed_fp8:hybrid",
    "mixed_fp8:rowwise",
    "mixed_fp8:rowwise_wgrad_half",
    "mixed_int8",
    "mixed_int8:wgrad_half",
)
BALANCE = 0.01
"""The weight of what keeps experts equally busy (Fedus et al. 2021, section 2.2)."""


class Run(NamedTuple):
    """Where one run ended: its held-out losses, and how many steps were skipped.

    Attributes:
      loss: under the policy.
      in_float32: of the same weights.
      skipped: the number of steps.
    """

    loss: float
    in_float32: float
    skipped: int


def train(job: Job, policy: str, steps: int) -> Run:
    """Trains a job's model from its first weights."""
    state = first_state(job, policy, steps)
    for number in range(steps):
        state = train_step(state, job.batch(number))
    skipped = jaxmp.loss_scale_metrics(state)["skipped_steps"]
    in_float32 = state.replace(apply_fn=job.model.apply)
    losses = (float(held_out_loss(x, job.held_out)) for x in (state, in_float32))
    run = Run(*losses, int(skipped))
    print(f"{policy}, seed {job.seed}: {run}", file=sys.stderr, flush=True)
    return run


def first_state(job: Job, policy: str, steps: int) -> jaxmp.TrainState:
    """The state before the first step."""
    model, optimizer = setup(job.model, job.rules, policy, steps)
    inputs, _ = job.batch(0)
    return jaxmp.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(job.seed), inputs)["params"],
        tx=optimizer,
        policy=policy,
    )


@functools.cache  # so that all seeds share what is compiled
def setup(
    model: nn.Module, rules: Callable[[jaxmp.Policy], Rules], policy: str, steps: int
) -> tuple[nn.Module, Any]:
    """The model under a policy, and the optimizer of `train_lm.py`."""
    read = jaxmp.get_policy(policy)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, train_lm.LEARNING_RATE, steps // 10, steps, train_lm.LEARNING_RATE / 10
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )
    model = jaxmp.apply_policy(model, read, rules=rules(read))
    return model, jaxmp.loss_scaling(optimizer, read)


def loss_of(state: jaxmp.TrainState, params: Any, batch: Batch) -> jax.Array:
    """The loss that is trained on."""
    inputs, labels = batch
    logits, sown = state.apply_fn({"params": params}, inputs, mutable=["balance"])
    loss = train_lm.mean_loss(logits, labels)
    return loss + BALANCE * sum(jax.tree.leaves(sown), jnp.float32(0))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: jaxmp.TrainState, batch: Batch) -> jaxmp.TrainState:
    loss, grads = gradient(state, batch)
    return state.apply_gradients(grads=grads, value=loss)


@jax.jit
def gradient(state: jaxmp.TrainState, batch: Batch) -> tuple[jax.Array, Any]:
    """The loss of a batch and its gradient, at the state's weights."""
    return state.value_and_grad(lambda params: loss_of(state, params, batch))(
        state.params
    )


@jax.jit
def held_out_loss(state: jaxmp.TrainState, batches: Batch) -> jax.Array:
    """The mean loss of stacked batches, without the experts' balance."""

    def loss(batch: Batch) -> jax.Array:
        logits = state.apply_fn({"params": state.params}, batch[0])
        return train_lm.mean_loss(logits, batch[1])

    return jax.lax.map(loss, batches).mean()


def losses_table(name: str, steps: int, seeds: int) -> None:
    """Trains with every policy, and prints a row as soon as it is known."""
    jobs = [JOBS[name](seed) for seed in range(seeds)]
    columns = [f"seed {job.seed}" for job in jobs]
    print_row(
        "policy", *columns, "mean", "against float32", "weights in float32", "skipped"
    )
    print("|---" * (seeds + 5) + "|")
    full = np.nan
    for policy in POLICIES:
        runs = [train(job, policy, steps) for job in jobs]
        losses = [run.loss for run in runs]
        mean = np.mean(losses)
        trained = np.mean([run.in_float32 for run in runs])
        full = mean if policy == "float32" else full
        cells = [f"{x:.4f}" for x in (*losses, mean)]
        skipped = sum(run.skipped for run in runs)
        gaps = (f"{100 * (x / full - 1):+.2f} %" for x in (mean, trained))
        print_row(f"`{policy}`", *cells, *gaps, skipped)


def gradients_table(name: str) -> None:
    """Compares the gradient of the first batch, at the first weights, to float32's."""
    job = JOBS[name](0)
    print_row("policy", "1 - cosine", "relative error")
    print("|---" * 3 + "|")
    full = None
    for policy in POLICIES:
        _, grads = gradient(first_state(job, policy, 10), job.batch(0))
        found = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
        found = found.astype(np.float64)
        if full is None:
            full = found
            continue
        norms = np.linalg.norm(found) * np.linalg.norm(full)
        error = np.linalg.norm(found - full) / np.linalg.norm(full)
        print_row(f"`{policy}`", f"{1 - found @ full / norms:.1e}", f"{error:.2%}")


def print_row(*cells: Any) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, default="lm")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gradients", action="store_true")
    args = parser.parse_args(argv)
    if args.gradients:
        gradients_table(args.job)
    else:
        losses_table(args.job, args.steps, args.seeds)


if __name__ == "__main__":
    main()
