"""Prints what each optimizer set-up stores, in bytes per parameter, and what it moves.

    python examples/benchmarks/optimizer_memory.py
    pip install 'jaxmp[targets]'
    python examples/benchmarks/optimizer_memory.py --traffic

The first table is counted from the shapes and dtypes that `init` returns. The second
asks XLA's own TPU v5e compiler how many bytes an update step accesses, and compares
them with the least that it can: every array that it takes is read once, gradients
twice (once to decide whether all of them are finite, before anything is written), and
every array that it returns is written once.
"""

import argparse
import os
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import optax

import jaxmp
from jaxmp.optimizers import accumulate, cast_state, master_weights, stochastic_rounding
from jaxmp.report import compile_for

# Leaves too large for VMEM, into which XLA would prefetch smaller ones: it counts such
# copies as accesses.
LEAVES, SHAPE = 2, (16384, 8192)  # 268 M parameters
PARAMETERS = LEAVES * SHAPE[0] * SHAPE[1]


class Setup(NamedTuple):
    """An optimizer, and the dtype of the parameters that it is given."""

    name: str
    params: str
    optimizer: optax.GradientTransformation


def setups():
    """Lists what the table compares."""
    adamw = optax.adamw(1e-3)
    coarse = cast_state(adamw, "bfloat16", rounding="stochastic")
    return [
        Setup("adamw", "float32", adamw),
        Setup("cast_state(adamw)", "float32", coarse),
        Setup("master_weights(adamw)", "bfloat16", master_weights(adamw)),
        Setup("master_weights(adamw)", "float16", master_weights(adamw)),
        Setup("master_weights(cast_state(adamw))", "bfloat16", master_weights(coarse)),
        Setup("split master_weights(adamw)", "bfloat16", split(adamw)),
        Setup("split master_weights(cast_state(adamw))", "bfloat16", split(coarse)),
        Setup(
            "stochastic_rounding(adamw)",
            "bfloat16",
            stochastic_rounding(adamw, seed=0),
        ),
        Setup(
            "stochastic_rounding(cast_state(adamw))",
            "bfloat16",
            stochastic_rounding(coarse, seed=0),
        ),
        Setup("accumulate(adamw, 4)", "float32", accumulate(adamw, 4)),
        Setup(
            "split master_weights(accumulate(cast_state(adamw), 4))",
            "bfloat16",
            split(accumulate(coarse, 4)),
        ),
        Setup("no master: adamw (loses updates)", "bfloat16", adamw),
    ]


def split(inner):
    return master_weights(inner, split=True)


def weights(dtype):
    shape = jax.ShapeDtypeStruct(SHAPE, dtype)
    return {f"w{i}": shape for i in range(LEAVES)}


def bytes_per_parameter(tree):
    """Sizes of all arrays of a tree; scalars vanish."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / PARAMETERS


def stored(setup):
    """Bytes per parameter of the kinds of arrays that stay between two steps."""
    params = weights(setup.params)
    state = jax.eval_shape(setup.optimizer.init, params)
    get = optax.tree_utils.tree_get
    parts = {
        "params": params,
        "master": get(state, "master"),
        "moments": [get(state, "mu"), get(state, "nu")],
        "sums": get(state, "grad_sums"),
    }
    sizes = {name: bytes_per_parameter(tree) for name, tree in parts.items()}
    total = bytes_per_parameter([params, state])
    assert abs(sum(sizes.values()) - total) < 1e-3, "an array is missing from the table"
    return {**sizes, "stored": total, "gradients": jnp.dtype(setup.params).itemsize}


def memory_table():
    """Lays out what is stored, as text."""
    columns = ["params", "master", "moments", "sums", "stored", "gradients"]
    header = f"{'optimizer':54} | {'params in':9} | " + " | ".join(columns)
    lines = [header, "-" * len(header)]
    for setup in setups():
        sizes = stored(setup)
        cells = [f"{sizes[name]:{len(name)}.0f}" for name in columns]
        lines.append(f"{setup.name:54} | {setup.params:9} | " + " | ".join(cells))
    return "\n".join(lines)


def compile_update(optimizer, params_dtype, target):
    """Compiles `(params, state, grads) -> (params, state)`, the first two donated."""
    tx = jaxmp.loss_scaling(optimizer, "mixed_bfloat16")

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = weights(params_dtype)
    state = jax.eval_shape(tx.init, params)
    return compile_for(target, step, params, state, params, donate_argnums=(0, 1))


def least_traffic(optimizer, params_dtype):
    """Bytes per parameter that an update reads and writes at least."""
    params = weights(params_dtype)
    kept = bytes_per_parameter([params, jax.eval_shape(optimizer.init, params)])
    gradients = bytes_per_parameter(params)
    return 2 * kept + 2 * gradients


def traffic(setup, target="tpu-v5e"):
    """Bytes per parameter that the compiled update accesses, and the least."""
    compiled = compile_update(setup.optimizer, setup.params, target)
    accessed = compiled.cost_analysis()["bytes accessed"] / PARAMETERS
    return accessed, least_traffic(setup.optimizer, setup.params)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traffic", action="store_true")
    print(memory_table())
    if parser.parse_args().traffic:
        print(f"\n{'loss_scaling of':54} | bytes | least | ratio")
        for setup in setups():
            if "accumulate" not in setup.name:
                accessed, least = traffic(setup)
                ratio = accessed / least
                print(f"{setup.name:54} | {accessed:5.1f} | {least:5.1f} | {ratio:.3f}")


if __name__ == "__main__":
    main()
