"""Trains the small GPT of train_lm.py on all devices there are, in four precisions.

    python examples/train_lm_sharded.py                   # weights divided: FSDP
    python examples/train_lm_sharded.py --layout dp       # weights whole on each device
    python examples/train_lm_sharded.py --layout zero1    # only the optimizer divided
    python -m jaxmp report examples/train_lm_sharded.py:make_step --target h100:8

The model and the step are those of one device. What is new are shardings: of the batch,
of the weights and of the optimizer's state. XLA makes the collectives. The policy says
in which dtype weights are gathered and gradients are added up. On a machine without an
accelerator, eight parts of the CPU are the devices.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import results
import train_lm
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from runner import Experiment, Training, read_flags, run

import jaxmp
from jaxmp.sharding import state_shardings

LAYOUTS = ("fsdp", "dp", "zero1")
POLICIES = (
    "float32",
    "mixed_bfloat16",
    "mixed_bfloat16,reduce=float32",
    "mixed_float16",
)
TARGET_DEVICES = 8
LEAST_SHOWN = 0.05 * 2**20  # bytes
AUTO = (AxisType.Auto,)
HOST_DEVICES = "--xla_force_host_platform_device_count"


def divide_the_cpu(count: int) -> None:
    """Makes devices of the CPU, for machines that have no others.

    XLA reads the flag when the first array is made. It changes nothing where there is
    an accelerator.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if HOST_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_DEVICES}={count}".strip()


def shardings_of(state: jaxmp.TrainState, mesh: Any, layout: str) -> jaxmp.TrainState:
    """Where each array of a state lies: whole on each device, or divided over all.

    Args:
      state: a state, or its shapes.
      mesh: with the axis "data".
      layout: "fsdp" divides weights and state, "zero1" the state, "dp" nothing.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    if layout == "dp":
        return jax.tree.map(lambda x: whole, state)

    def divided(x: Any) -> NamedSharding:
        # Not along the last axis: activations would be divided like it, not by rows.
        fits = (i for i, size in enumerate(x.shape[:-1]) if size % mesh.size == 0)
        axis = next(fits, None)
        if axis is None:
            return whole
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    is_divided = layout == "fsdp"
    weights = jax.tree.map(divided if is_divided else lambda x: whole, state.params)
    return state_shardings(state, state.params, weights, over="data")


def step_on(shardings: jaxmp.TrainState) -> Callable[[Any, Any], Any]:
    """The step of one device, whose state stays where it lies."""

    def train_step(state: jaxmp.TrainState, windows: jax.Array) -> Any:
        state, metrics = train_lm.train_step(state, windows)
        return jax.lax.with_sharding_constraint(state, shardings), metrics

    return train_step


def prepare(policy: jaxmp.Policy, args: argparse.Namespace) -> Training:
    """The run of a policy on all devices; each makes its part of the state."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=AUTO)

    def new_state() -> jaxmp.TrainState:
        return train_lm.new_state(policy, args)

    shardings = shardings_of(jax.eval_shape(new_state), mesh, args.layout)
    state = jax.jit(new_state, out_shardings=shardings)()
    training = train_lm.training_from(state, policy, args)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def batch(step: int) -> jax.Array:
        windows = training.batch(step)
        return jax.device_put(windows[: len(windows) // mesh.size * mesh.size], rows)

    return training._replace(train_step=step_on(shardings), batch=batch)


def step_for_target(policy: jaxmp.Policy, args: argparse.Namespace) -> tuple[Any, ...]:
    """The step and its arguments, as shapes on eight devices that are not here."""
    mesh = AbstractMesh((TARGET_DEVICES,), ("data",), axis_types=AUTO)

    def placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda: train_lm.new_state(policy, args))
    shardings = shardings_of(shapes, mesh, args.layout)
    state = jax.tree.map(placed, shapes, shardings)
    windows = jax.ShapeDtypeStruct((train_lm.BATCH, train_lm.CONTEXT + 1), np.int32)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return step_on(shardings), state, placed(windows, rows)


def collectives(rows: dict[str, Any]) -> str:
    """What each device sends in a step, as a Markdown table with a line per policy."""

    def cells(name: str, row: Any) -> Iterator[tuple[str, str]]:
        found = row.contents.collectives if row.contents else ()
        yield f"sent by each of {TARGET_DEVICES} H100s in a step", name
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):
            dtypes = dict.fromkeys(one.dtype for one in found if one.kind == kind)
            sent = {dtype: wire_of(found, kind, dtype) for dtype in dtypes}
            parts = [
                f"{dtype} {results.show_bytes(wire)}"
                for dtype, wire in sent.items()
                if wire >= LEAST_SHOWN
            ]
            yield kind, " + ".join(parts) or "none"
        yield "in all", results.show_bytes(sum(one.wire for one in found))

    lines = [dict(cells(name, row)) for name, row in rows.items()]
    return results.markdown([list(lines[0]), *(list(line.values()) for line in lines)])


def wire_of(found: Any, kind: str, dtype: str) -> float:
    """Bytes on the wire of one kind of collective in one dtype."""
    return sum(one.wire for one in found if (one.kind, one.dtype) == (kind, dtype))


def add_flags(add: Callable[..., None]) -> None:
    add("--layout", "of the state", choices=LAYOUTS, default="fsdp")


def describe(args: argparse.Namespace) -> str:
    where = f"{jax.device_count()} devices ({jax.devices()[0].device_kind})"
    return f"{train_lm.describe(args)}\nOn {where}, {args.layout}."


EXPERIMENT = Experiment(
    script=__file__,
    prepare=prepare,
    describe=describe,
    score="validation loss",
    steps=600,
    growth_interval=40,
    policies=POLICIES,
    target=f"h100:{TARGET_DEVICES}",
    compiled_step=step_for_target,
    add_flags=add_flags,
    appendix=collectives,
)


def make_step(policy: str) -> tuple[Any, ...]:
    """The step and its arguments, as `python -m jaxmp` takes them."""
    step, *arguments = step_for_target(
        jaxmp.get_policy(policy), read_flags(EXPERIMENT, [])
    )
    return jax.jit(step, donate_argnums=0), *arguments


if __name__ == "__main__":
    divide_the_cpu(TARGET_DEVICES)
    run(EXPERIMENT)
