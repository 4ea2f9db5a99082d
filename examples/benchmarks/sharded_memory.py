"""Prints what 7 billion weights need on each device, by optimizer and layout.

    python examples/benchmarks/sharded_memory.py
    pip install 'jaxmp[targets]'
    python examples/benchmarks/sharded_memory.py --compile

The model is LLaMA-7B, one sequence of 2048 tokens per device, with its layers in a loop
and computed again in the backward pass. Nothing is allocated. Arguments, which are the
weights and the state of the optimizer, follow from shapes and shardings. With
`--compile`, XLA's own compilers for the H100 and the TPU v5e say what a whole step
needs besides, and whether it fits. Their answers are kept on disk.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from models.llama import Llama
from page import GIB, markdown_table, write_section
from sharded_steps import laid_out

import jaxmp
from jaxmp.report import compile_step_of
from jaxmp.sharding import state_shardings

LENGTH = 2048
MODEL = Llama()
TARGETS = {"h100:8": 8, "tpu-v5e:256": 256}


class Setup(NamedTuple):
    """An optimizer, and the policy that it is used under."""

    policy: str
    wrap: Callable[[Any], Any]


def half_moments(inner: Any) -> Any:
    return jaxmp.cast_state(inner, "bfloat16", rounding="stochastic")


MIXED, HALF = "mixed_bfloat16", "params=bfloat16,compute=bfloat16,output=float32"
SETUPS = {
    "AdamW in float32": Setup(MIXED, lambda inner: inner),
    "half moments": Setup(MIXED, half_moments),
    "master weights": Setup(HALF, jaxmp.master_weights),
    "split master weights": Setup(
        HALF, lambda inner: jaxmp.master_weights(inner, split=True)
    ),
    "split master weights, half moments": Setup(
        HALF, lambda inner: jaxmp.master_weights(half_moments(inner), split=True)
    ),
}
LAYOUTS = ("replicated", "ZeRO-1", "FSDP")
KEY_CASES = tuple(
    (setup, layout)
    for setup in (
        "AdamW in float32",
        "master weights",
        "split master weights, half moments",
    )
    for layout in LAYOUTS
)
"""What `--write` compiles."""


class Case(NamedTuple):
    """A step: a key of `SETUPS`, one of `LAYOUTS`, and how many devices."""

    setup: str
    layout: str
    devices: int

    def __str__(self) -> str:
        return f"{self.setup}, {self.layout}, {self.devices} devices"


def shardings_of(case: Case, params: Any) -> Any:
    """How the weights lie: whole, or divided by their rows."""
    mesh = AbstractMesh((case.devices,), ("data",), axis_types=(AxisType.Auto,))

    def sharding(path: tuple[Any, ...], x: Any) -> NamedSharding:
        if case.layout != "FSDP":
            return NamedSharding(mesh, PartitionSpec())
        layers = jax.tree_util.DictKey("layers") in path
        return NamedSharding(mesh, PartitionSpec(*[None] * layers, "data"))

    return jax.tree_util.tree_map_with_path(sharding, params)


def arrays(case: Case) -> tuple[Any, Any, Any]:
    """The optimizer, and the shapes of weights and state as they lie."""
    setup = SETUPS[case.setup]
    policy = jaxmp.get_policy(setup.policy)
    tx = jaxmp.loss_scaling(setup.wrap(optax.adamw(1e-4)), policy)
    params = MODEL.params(policy.param_dtype)
    state = jax.eval_shape(tx.init, params)
    shardings = shardings_of(case, params)
    over = () if case.layout == "replicated" else "data"
    lie = state_shardings(state, params, shardings, over=over)
    return tx, laid_out(params, shardings), laid_out(state, lie)


def step_of(case: Case) -> tuple[Any, ...]:
    """The training step, jitted, and the shapes of its arguments."""
    tx, params, state = arrays(case)

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = MODEL(params, tokens[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    cast_loss_fn = jaxmp.autocast(loss_fn, SETUPS[case.setup].policy)

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jaxmp.value_and_grad(cast_loss_fn)(
            params, tokens, loss_scale=state
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    mesh = jax.tree.leaves(params)[0].sharding.mesh
    lie = jax.tree.map(lambda x: x.sharding, (params, state))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tokens = jax.ShapeDtypeStruct((case.devices, LENGTH + 1), jnp.int32, sharding=rows)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*lie, everywhere))
    return jitted, params, state, tokens


def bytes_on_a_device(tree: Any) -> int:
    """Bytes of the parts of arrays that one device has."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
    )


def stored_table() -> str:
    """Weights and state per device, from shapes and shardings."""
    weights = sum(x.size for x in jax.tree.leaves(MODEL.params(jnp.float32)))
    counts = sorted(TARGETS.values())
    body = []
    for setup in SETUPS:
        for layout in LAYOUTS:
            sizes = [
                bytes_on_a_device(arrays(Case(setup, layout, n))[1:]) for n in counts
            ]
            per_weight = [f"{size / weights:.2f}" for size in sizes]
            gib = [f"{size / GIB:.2f}" for size in sizes]
            body.append([setup, layout, *gib, *per_weight])
    columns = [f"GiB, {n} devices" for n in counts]
    columns += [f"bytes per weight, {n} devices" for n in counts]
    return markdown_table(["optimizer", "layout", *columns], body)


def compiled_table(cases: Iterable[tuple[str, str]], targets: Iterable[str]) -> str:
    """A step per device, as the compilers plan it."""
    body = []
    for target in targets:
        here = [Case(*case, TARGETS[target]) for case in cases]
        named = {str(case): case for case in here}
        report = compile_step_of(
            lambda name, named=named: step_of(named[name]),
            policies=list(named),
            targets=[target],
            progress=True,
        )
        for case, row in zip(named.values(), report.rows, strict=True):
            sizes = (row.arguments, row.temp, row.peak)
            gib = ["" if size is None else f"{size / GIB:.2f}" for size in sizes]
            memory = "" if row.memory is None else f"{row.memory / GIB:.2f}"
            fits = "yes" if row.fits else "no"
            body.append([target, case.setup, case.layout, *gib, memory, fits])
    columns = ["arguments", "temp", "peak", "memory"]
    columns = [f"{name}, GiB" for name in columns]
    return markdown_table(["target", "optimizer", "layout", *columns, "fits"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile whole steps")
    parser.add_argument("--optimizer", nargs="+", default=SETUPS, choices=SETUPS)
    parser.add_argument("--layout", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--target", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--write", metavar="PAGE", help="write the page's tables")
    arguments = parser.parse_args()
    if arguments.write:
        write_section(arguments.write, "stored", stored_table())
        table = compiled_table(KEY_CASES, ["h100:8"])
        write_section(arguments.write, "compiled", table)
        return
    print(f"Weights and optimizer state on each device\n\n{stored_table()}")
    if arguments.compile:
        cases = list(itertools.product(arguments.optimizer, arguments.layout))
        table = compiled_table(cases, arguments.target)
        print(f"\nA whole step on each device\n\n{table}")


if __name__ == "__main__":
    main()
