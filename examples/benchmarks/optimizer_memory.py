"""Prints what each optimizer set-up stores, in bytes per parameter, and what it moves.

    python examples/benchmarks/optimizer_memory.py
    pip install 'jaxmp[targets]'
    python examples/benchmarks/optimizer_memory.py --traffic

The optimizer is AdamW, on 268 M parameters. The first table is counted from the shapes
and dtypes that `init` returns. The second asks XLA's own TPU v5e compiler how many
bytes an update step accesses, and compares them with the least possible: every array is
read once, gradients twice (once to decide whether all of them are finite, before
anything is written), and every result is written once.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from compiled_updates import (
    Weights,
    bytes_accessed,
    compile_update,
    prepare_to_compile,
)

import jaxmp
from jaxmp.optimizers import accumulate, cast_state, master_weights, stochastic_rounding

# Leaves too large for VMEM, into which XLA would prefetch smaller ones: it counts such
# copies as accesses.
WEIGHTS = Weights(leaves=2, shape=(16384, 8192))


class Setup(NamedTuple):
    """An optimizer, and the dtype of its parameters."""

    name: str
    params: str
    optimizer: optax.GradientTransformation


def setups() -> list[Setup]:
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


def split(inner: optax.GradientTransformation) -> Any:
    return master_weights(inner, split=True)


def bytes_per_parameter(tree: Any) -> float:
    """Sizes of all arrays of a tree; scalars vanish."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size / WEIGHTS.parameters


def stored(setup: Setup) -> dict[str, float]:
    """Bytes per parameter of each kind of array that stays between two steps."""
    params = WEIGHTS.arrays(setup.params)
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


def memory_table() -> str:
    """Lays out what is stored, as text."""
    columns = ["params", "master", "moments", "sums", "stored", "gradients"]
    header = f"{'optimizer':54} | {'params in':9} | " + " | ".join(columns)
    lines = [header, "-" * len(header)]
    for setup in setups():
        sizes = stored(setup)
        cells = [f"{sizes[name]:{len(name)}.0f}" for name in columns]
        lines.append(f"{setup.name:54} | {setup.params:9} | " + " | ".join(cells))
    return "\n".join(lines)


def least_traffic(optimizer: optax.GradientTransformation, params_dtype: str) -> float:
    """The fewest bytes per parameter that an update can read and write."""
    params = WEIGHTS.arrays(params_dtype)
    kept = bytes_per_parameter([params, jax.eval_shape(optimizer.init, params)])
    gradients = bytes_per_parameter(params)
    return 2 * kept + 2 * gradients


def compile_scaled(
    optimizer: optax.GradientTransformation, params_dtype: str, target: str
) -> jax.stages.Compiled:
    """Compiles the update under `loss_scaling`; gradients are as the parameters."""
    tx = jaxmp.loss_scaling(optimizer, "mixed_bfloat16")
    return compile_update(
        tx, WEIGHTS, target, params_dtype=params_dtype, grads_dtype=params_dtype
    )


def traffic(setup: Setup, target: str = "tpu-v5e") -> tuple[float, float]:
    """Bytes per parameter that the compiled update accesses, and the least possible."""
    accessed = bytes_accessed(compile_scaled(setup.optimizer, setup.params, target))
    assert accessed is not None
    least = least_traffic(setup.optimizer, setup.params)
    return accessed / WEIGHTS.parameters, least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traffic", action="store_true")
    arguments = parser.parse_args()
    prepare_to_compile()
    print(memory_table())
    if arguments.traffic:
        print(f"\n{'loss_scaling of':54} | bytes | least | ratio")
        for setup in setups():
            if "accumulate" not in setup.name:
                accessed, least = traffic(setup)
                ratio = accessed / least
                print(f"{setup.name:54} | {accessed:5.2f} | {least:5.1f} | {ratio:.3f}")


if __name__ == "__main__":
    main()
