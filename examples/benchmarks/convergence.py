"""Trains the language model of `train_lm.py` with each optimizer set-up.

    python examples/benchmarks/convergence.py
    python examples/benchmarks/convergence.py --plot docs/convergence.svg

The model has one layer of width 64; batches are 16 x 32 characters. Only what is stored
differs: every run computes in float32, and each seed gives all runs the same first
weights and batches, so that a difference in the loss is the optimizer's. The control
stores weights and moments in bfloat16 and rounds to nearest, as `optax.adamw` does with
bfloat16 parameters.
"""

import argparse
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from language_model import train_lm

import jaxmp
from jaxmp.optimizers import cast_state, master_weights, stochastic_rounding

SEEDS = (0, 1, 2)
STEPS, BATCH = 600, 16
WIDTH, LAYERS, CONTEXT = 64, 1, 32
LEARNING_RATE = 2e-3
RECORD_EVERY = 20


Results = dict[str, tuple[np.ndarray, np.ndarray]]
"""Maps a name to (losses by seed and step, held-out loss by seed)."""


def adamw(steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, steps // 20, steps, LEARNING_RATE / 100
    )
    return optax.adamw(rate, weight_decay=0.01)


def setups(steps: int = STEPS) -> dict[str, tuple[str, Any]]:
    """Maps a name to (dtype of the parameters, optimizer)."""
    inner = adamw(steps)
    coarse = cast_state(inner, "bfloat16", rounding="stochastic")
    return {
        "float32": ("float32", inner),
        "master_weights": ("bfloat16", master_weights(inner)),
        "split master_weights": ("bfloat16", master_weights(inner, split=True)),
        "split master_weights(cast_state)": (
            "bfloat16",
            master_weights(coarse, split=True),
        ),
        "stochastic_rounding(cast_state)": (
            "bfloat16",
            stochastic_rounding(coarse, seed=0),
        ),
        "plain bfloat16 (control)": ("bfloat16", inner),
    }


def make_model() -> tuple[jax.Array, jax.Array, train_lm.GPT]:
    """The text, its held-out part, and a smaller model than the example's."""
    text, held_out, vocabulary = train_lm.load_text(seed=0)
    model = train_lm.GPT(vocabulary, context=CONTEXT, width=WIDTH, layers=LAYERS)
    return jnp.asarray(text), jnp.asarray(held_out), model


def start(
    model: train_lm.GPT, dtype: str, optimizer: Any, seed: int
) -> tuple[Any, Any, Any]:
    """Returns the optimizer with a loss scale, and its first parameters and state."""
    with warnings.catch_warnings():  # the control is what the warning warns of
        warnings.simplefilter("ignore", jaxmp.errors.HalfParamsWarning)
        tx = jaxmp.loss_scaling(optimizer, "mixed_bfloat16")
        example = jnp.zeros((1, CONTEXT), jnp.int32)
        params = model.init(jax.random.key(seed), example)["params"]
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        return tx, params, tx.init(params)


def train(name: str, seed: int, steps: int = STEPS) -> tuple[np.ndarray, float]:
    """Returns the training losses and the held-out loss of one run."""
    text, held_out, model = make_model()
    tx, params, state = start(model, *setups(steps)[name], seed)

    def loss_fn(params: Any, windows: jax.Array) -> jax.Array:
        params = jaxmp.cast_to_full(params)
        logits = model.apply({"params": params}, windows[:, :-1])
        return train_lm.mean_loss(logits, windows[:, 1:])

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        starts = jax.random.randint(key, (BATCH,), 0, len(text) - CONTEXT)
        windows = train_lm.windows_at(text, starts, CONTEXT)
        loss, grads = jaxmp.value_and_grad(loss_fn)(params, windows, loss_scale=state)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def run(params: Any, state: Any) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(1000 + seed), steps)
        (params, _), losses = jax.lax.scan(step, (params, state), keys)
        starts = jnp.arange(0, len(held_out) - CONTEXT, CONTEXT)[:1024]
        windows = train_lm.windows_at(held_out, starts, CONTEXT)
        batches = windows.reshape(-1, 64, CONTEXT + 1)
        return losses, jax.lax.map(lambda w: loss_fn(params, w), batches).mean()

    losses, final = run(params, state)
    return np.asarray(losses), float(final)


def run_all(
    names: Iterable[str] | None = None, seeds: Sequence[int] = SEEDS, steps: int = STEPS
) -> Results:
    """Trains with each set-up and seed, and prints a row for each set-up."""
    results = {}
    for name in names or setups():
        runs = [train(name, seed, steps) for seed in seeds]
        losses, final = (np.array(x) for x in zip(*runs, strict=True))
        results[name] = losses, final
        print(row(name, final), flush=True)
        jax.clear_caches()
    return results


def row(name: str, final: np.ndarray) -> str:
    cells = " | ".join(f"{x:.4f}" for x in final)
    return f"{name:34} | {cells} | {np.mean(final):.4f}"


def plot(results: Results, path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, (losses, _) in results.items():
        smooth = losses[:, : losses.shape[1] // RECORD_EVERY * RECORD_EVERY]
        smooth = smooth.reshape(len(losses), -1, RECORD_EVERY).mean((0, 2))
        steps = (np.arange(len(smooth)) + 1) * RECORD_EVERY
        style = "--" if "control" in name else "-"
        axes.plot(steps, smooth, style, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss, mean of three seeds", ylim=(None, 3))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--plot")
    args = parser.parse_args()
    seeds = " | ".join(f"{seed:6}" for seed in SEEDS)
    print(f"{'held-out loss of seed':34} | {seeds} | mean")
    results = run_all(steps=args.steps)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
