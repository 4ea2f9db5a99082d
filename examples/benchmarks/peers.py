"""One float16 training step with each library that JAX users have for it.

Flax's `DynamicScale`, `optax.apply_if_finite`, jmp, mpx and jaxmp train the same GPT-2.
On the CPU a tiny one is trained: they take turns, one step each, and the CPU time of
every step is compared with the others of its round. GPT-2 small is traced and lowered.
XLA's own compilers say what two of its layers need on an H100 and a TPU v5e.

    pip install 'jaxmp[test,targets]'
    python examples/benchmarks/peers.py --write docs/benchmarks.md

The CPU emulates half precision: its times are ratios of overhead, not a speed claim.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ways
from compiled_steps import abstract_arguments
from compiled_updates import prepare_to_compile
from models import Job
from models.gpt2 import make_job
from page import GIB, markdown_table, write_section
from trace_time import seconds_to_lower
from update_step import INIT_SCALE

from jaxmp.report import compile_step_of
from jaxmp.report._rows import Row

TARGETS = ("h100", "tpu-v5e")
# GPT-2s: what is trained on this CPU, traced, and compiled.
TRAINED = make_job(8, 64, vocabulary=512, width=128, layers=2, heads=4)
TRACED = make_job(8, 1024)
COMPILED = make_job(8, 512, vocabulary=8192, layers=2)

HALF = {"dtype": jnp.float16, "init_scale": INIT_SCALE}
PEERS: dict[str, Callable[[Job], ways.Training]] = {
    "Flax `DynamicScale`": functools.partial(ways.by_hand, **HALF),
    "`optax.apply_if_finite`": functools.partial(
        ways.with_apply_if_finite, dtype=jnp.float16
    ),
    "jmp": functools.partial(ways.with_jmp, **HALF),
    "mpx": functools.partial(ways.with_mpx, init_scale=INIT_SCALE),
    "jaxmp, `apply_policy`": functools.partial(ways.with_jaxmp, autocast=False, **HALF),
    "jaxmp, `autocast`": functools.partial(ways.with_jaxmp, autocast=True, **HALF),
}


# Measurements; a peer that fails is a row that says so


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, or what it raised, in one line."""
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def start(peer: str, job: Job) -> tuple[Any, Any]:
    """A compiled step and the state after two steps."""
    training = PEERS[peer](job)
    step = jax.jit(training.step, donate_argnums=0)
    state = jax.jit(training.init)(jax.random.key(0))
    for _ in range(2):  # some compile again for the second
        state, _ = step(state, job.batch(jax.random.key(1)))
    return step, state


def seconds_per_step(job: Job, rounds: int) -> dict[str, Any]:
    """Seconds of CPU in every round and the number of compilations, or an error."""
    batch = job.batch(jax.random.key(1))
    runs = {peer: attempt(start, peer, job) for peer in PEERS}
    seconds = {peer: [] for peer in runs}
    for _ in range(rounds):
        for peer, run in runs.items():
            if isinstance(run, str):
                continue
            step, state = run
            began = time.process_time()
            state, _ = jax.block_until_ready(step(state, batch))
            seconds[peer].append(time.process_time() - began)
            runs[peer] = step, state
    return {
        peer: run
        if isinstance(run, str)
        else (np.array(seconds[peer]), run[0]._cache_size())
        for peer, run in runs.items()
    }


def least_seconds_to_lower(job: Job, rounds: int) -> dict[str, Any]:
    """Least seconds of CPU to trace and lower a step, or an error."""
    times = [
        {peer: attempt(seconds_to_lower, way, job) for peer, way in PEERS.items()}
        for _ in range(rounds)
    ]
    return {peer: min(seconds[peer] for seconds in times) for peer in PEERS}


def compiled(peer: str, target: str, job: Job) -> Row:
    """The report's row of a peer's step on a target."""

    def step_of(_: str) -> tuple[Any, ...]:
        training = PEERS[peer](job)
        return training.step, *abstract_arguments(training, job)

    report = compile_step_of(
        step_of, policies=[peer], targets=[target], donate_argnums=(0,)
    )
    return report.rows[0]


# Tables


def ratios(values: Iterable[Any], unit: str = "", scale: float = 1) -> list[str]:
    """Each value with its ratio to the least of them; errors stay."""
    values = list(values)
    best = min((x for x in values if not isinstance(x, str)), default=1)
    return [
        x if isinstance(x, str) else f"{x / best:.2f} ({x * scale:.3g} {unit})".strip()
        for x in values
    ]


def cpu_columns(job: Job, rounds: int) -> dict[str, list[str]]:
    """Steps on this CPU, relative to the peer of the least median."""
    found = seconds_per_step(job, rounds)
    measured = [value[0] for value in found.values() if not isinstance(value, str)]
    reference = min(measured, key=np.median)
    cells, compilations = [], []
    for value in found.values():
        if isinstance(value, str):
            cells.append(value)
            compilations.append("")
            continue
        seconds, count = value
        low, middle, high = np.quantile(seconds / reference, (0.25, 0.5, 0.75))
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        compilations.append(str(count))
    return {"CPU time per step (quartiles)": cells, "compilations": compilations}


def target_columns(job: Job, target: str) -> dict[str, list[str]]:
    """Memory and traffic of a step on a target."""
    rows = [attempt(compiled, peer, target, job) for peer in PEERS]
    read = {
        "memory": lambda row: row.peak / GIB,
        "traffic": lambda row: (row.accessed or row.roofline.bytes) / GIB,
    }
    return {
        f"{target} {name}": ratios(
            [row if isinstance(row, str) else value(row) for row in rows], "GiB"
        )
        for name, value in read.items()
    }


def tables(rounds: int, targets: Iterable[str]) -> str:
    """Measures everything; returns Markdown."""
    cpu = cpu_columns(TRAINED, rounds)
    seconds = least_seconds_to_lower(TRACED, rounds=3)
    cpu["CPU time to trace and lower"] = ratios(seconds.values(), "s")
    programs = {}
    for target in targets:
        programs |= target_columns(COMPILED, target)
    return "\n\n".join(
        markdown_table(["", *columns], list(zip(PEERS, *columns.values(), strict=True)))
        for columns in (cpu, programs)
        if columns
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--write", metavar="PAGE", help="put the tables there too")
    arguments = parser.parse_args()
    prepare_to_compile()
    text = tables(arguments.rounds, arguments.target or TARGETS)
    print(text)
    if arguments.write:
        write_section(arguments.write, "peers", text)


if __name__ == "__main__":
    main()
