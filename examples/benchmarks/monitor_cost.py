"""Prints what `jaxmp.numerics.monitor` costs a training step.

    python examples/benchmarks/monitor_cost.py
    pip install 'jaxmp[targets]'
    python examples/benchmarks/monitor_cost.py --traffic

The first runs the float16 step of the language model of `train_lm.py` (batches of 16 x
64 characters) on this machine, with and without a monitor, one step of each in turn.
The second compiles an update of 25 M parameters for TPU v5e and H100 and counts the
whole arrays (weights, moments and gradients) that its kernels read and write on every
step, per weight: what runs in the branch of the measured step is left out.
"""

import argparse
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import optax
from compiled_updates import (
    Weights,
    compile_update,
    kernels,
    prepare_to_compile,
    temporary_bytes,
)
from language_model import train_lm

import jaxmp
from jaxmp.numerics import monitor

EVERY, WARM_UP = 100, 10
WEIGHTS = Weights(leaves=6, shape=(2048, 2048))
TARGETS = ("tpu-v5e", "h100")


def watch(tx: Any) -> Any:
    return monitor(tx, every=EVERY)


# Time on this machine


class Run(NamedTuple):
    """A compiled step and its first state."""

    state: jaxmp.TrainState
    step: jax.stages.Compiled
    batches: list[train_lm.Array]
    seconds_to_compile: float


def make_run(watched: bool) -> Run:
    """Compiles the step of the language model, with or without a monitor."""
    state, text = language_model.make_state(watch if watched else lambda tx: tx)
    batches = language_model.batches(text, 20)
    began = time.perf_counter()
    lowered = jax.jit(train_lm.train_step, donate_argnums=0).lower(state, batches[0])
    step = lowered.compile()
    return Run(state, step, batches, time.perf_counter() - began)


class Times(NamedTuple):
    """Seconds and last states, by whether a monitor watched the run."""

    steps: dict[bool, np.ndarray]
    compiling: dict[bool, float]
    states: dict[bool, jaxmp.TrainState]


def time_steps(steps: int) -> Times:
    """Takes steps with and without a monitor in turn."""
    runs = {watched: make_run(watched) for watched in (False, True)}
    states = {watched: run.state for watched, run in runs.items()}
    seconds = {watched: [] for watched in runs}
    for i in range(steps):
        for watched, run in runs.items():
            began = time.perf_counter()
            batch = run.batches[i % len(run.batches)]
            states[watched], _ = run.step(states[watched], batch)
            jax.block_until_ready(states[watched])
            seconds[watched].append(time.perf_counter() - began)
    compiling = {watched: run.seconds_to_compile for watched, run in runs.items()}
    return Times({k: np.array(x) for k, x in seconds.items()}, compiling, states)


class Overhead(NamedTuple):
    """Median seconds of a step, and the share that a monitor adds to a run."""

    plain: float
    not_measured: float
    measured: float
    share: float


def overhead(seconds: dict[bool, np.ndarray]) -> Overhead:
    """Compares the medians of the steps after the first few."""
    numbers = np.arange(1, len(seconds[True]) + 1)
    is_measured = numbers % EVERY == 0
    is_counted = numbers > WARM_UP
    plain = np.median(seconds[False][is_counted])
    other = np.median(seconds[True][is_counted & ~is_measured])
    measured = np.median(seconds[True][is_measured])
    mean = ((EVERY - 1) * other + measured) / EVERY
    return Overhead(*map(float, (plain, other, measured, mean / plain - 1)))


def print_times(steps: int) -> None:
    seconds, compiling, states = time_steps(steps)
    found = overhead(seconds)
    total = seconds[True][WARM_UP:].sum() / seconds[False][WARM_UP:].sum() - 1
    print(f"step without a monitor       {1e3 * found.plain:8.2f} ms")
    print(f"with it, not measured        {1e3 * found.not_measured:8.2f} ms")
    print(f"with it, measured            {1e3 * found.measured:8.2f} ms")
    print(f"a run, every={EVERY}, by medians  {found.share:+8.2%}")
    print(f"a run, every={EVERY}, by sums     {total:+8.2%}")
    print(f"trace and compile, without   {compiling[False]:8.2f} s")
    print(f"trace and compile, with      {compiling[True]:8.2f} s")
    same = jax.tree.map(np.array_equal, states[False].params, states[True].params)
    print("same parameters, bit by bit  ", all(jax.tree.leaves(same)))


# Traffic on other machines


def cases() -> dict[str, tuple[Any, Any, str]]:
    """Maps the name of an update to it, the same under a monitor, and a dtype."""
    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    scaled = jaxmp.loss_scaling(clipped, "mixed_float16")
    return {
        f"{name}, {dtype} gradients": (tx, watch(tx), dtype)
        for name, tx in {"adamw": adamw, "loss_scaling(clip + adamw)": scaled}.items()
        for dtype in ("float32", "float16")
    }


def arrays_touched(hlo: str) -> float:
    """Whole arrays that kernels outside every branch read or write, per weight."""
    whole = "[{},{}]".format(*WEIGHTS.shape)
    count = sum(
        type_.count(whole)
        for kernel in kernels(hlo)
        if kernel.is_entry
        for type_ in (kernel.result, *kernel.operands)
    )
    return count / WEIGHTS.leaves


def measure(name: str, target: str) -> list[tuple[float, float]]:
    """Arrays touched per weight and temporary bytes per parameter, without and with."""
    *txs, dtype = cases()[name]
    found = []
    for tx in txs:
        compiled = compile_update(
            tx, WEIGHTS, target, params_dtype=jnp.float32, grads_dtype=dtype
        )
        temp = temporary_bytes(compiled) / WEIGHTS.parameters
        found.append((arrays_touched(compiled.as_text() or ""), temp))
    return found


def print_traffic() -> None:
    prepare_to_compile()
    print("update                                         target   arrays        temp")
    for target in TARGETS:
        for name in cases():
            (arrays, temp), (watched_arrays, watched_temp) = measure(name, target)
            print(
                f"{name:46} {target:7} {arrays:4.1f} {watched_arrays:4.1f}  "
                f"{temp:6.3f} {watched_temp:6.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=310)
    parser.add_argument("--traffic", action="store_true")
    args = parser.parse_args()
    print_traffic() if args.traffic else print_times(args.steps)


if __name__ == "__main__":
    main()
