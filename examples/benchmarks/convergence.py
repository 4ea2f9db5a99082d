"""Trains the language model of `train_lm.py` with each optimizer set-up and compares.

    python examples/benchmarks/convergence.py
    python examples/benchmarks/convergence.py --plot docs/convergence.svg

Only what is stored differs: every run computes in float32, and a seed gives the same
first weights and the same batches to each, so that a difference in the loss is the
optimizer's.
The control stores weights and moments in bfloat16 and rounds to nearest, which is what
`optax.adamw` does with bfloat16 parameters.
"""

import argparse
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmp
from jaxmp.optimizers import cast_state, master_weights, stochastic_rounding

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import train_lm

SEEDS = (0, 1, 2)
STEPS, BATCH, CONTEXT, WIDTH = 600, 16, 32, 64
LEARNING_RATE = 2e-3
RECORD_EVERY = 20


def adamw(steps):
    rate = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, steps // 20, steps, LEARNING_RATE / 100
    )
    return optax.adamw(rate, weight_decay=0.01)


def setups(steps=STEPS):
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


def make_model():
    """The text and the model of the example, made smaller."""
    train_lm.WIDTH, train_lm.CONTEXT, train_lm.LAYERS = WIDTH, CONTEXT, 1
    text, held_out, vocabulary = train_lm.load_text(seed=0)
    return jnp.asarray(text), jnp.asarray(held_out), train_lm.GPT(vocabulary)


def train(name, seed, steps=STEPS):
    """Returns the training losses and the held-out loss of one run."""
    text, held_out, model = make_model()
    dtype, optimizer = setups(steps)[name]
    with warnings.catch_warnings():  # the control is what the warning warns of
        warnings.simplefilter("ignore", jaxmp.errors.HalfParamsWarning)
        tx = jaxmp.loss_scaling(optimizer, "mixed_bfloat16")
        example = jnp.zeros((1, CONTEXT), jnp.int32)
        params = model.init(jax.random.key(seed), example)["params"]
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        state = tx.init(params)

    def loss_fn(params, windows):
        params = jaxmp.cast_to_full(params)
        logits = model.apply({"params": params}, windows[:, :-1])
        return train_lm.mean_loss(logits, windows[:, 1:])

    def windows_of(tokens, starts):
        return tokens[starts[:, None] + jnp.arange(CONTEXT + 1)[None]]

    def step(carry, key):
        params, state = carry
        starts = jax.random.randint(key, (BATCH,), 0, len(text) - CONTEXT)
        windows = windows_of(text, starts)
        loss, grads = jaxmp.value_and_grad(loss_fn)(params, windows, loss_scale=state)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def run(params, state):
        keys = jax.random.split(jax.random.key(1000 + seed), steps)
        (params, _), losses = jax.lax.scan(step, (params, state), keys)
        starts = jnp.arange(0, len(held_out) - CONTEXT, CONTEXT)[:1024]
        batches = windows_of(held_out, starts).reshape(-1, 64, CONTEXT + 1)
        return losses, jax.lax.map(lambda w: loss_fn(params, w), batches).mean()

    losses, final = run(params, state)
    return np.asarray(losses), float(final)


def run_all(names=None, seeds=SEEDS, steps=STEPS):
    """Maps a name to (losses by seed and step, held-out loss by seed)."""
    results = {}
    for name in names or setups():
        runs = [train(name, seed, steps) for seed in seeds]
        results[name] = tuple(np.array(x) for x in zip(*runs, strict=True))
        print(row(name, results[name][1]), flush=True)
        jax.clear_caches()
    return results


def row(name, final):
    cells = " | ".join(f"{x:.4f}" for x in final)
    return f"{name:34} | {cells} | {np.mean(final):.4f}"


def plot(results, path):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--plot")
    args = parser.parse_args()
    print(row("held-out loss of seed", []).replace(" |  | nan", " | 0, 1, 2 | mean"))
    results = run_all(steps=args.steps)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
