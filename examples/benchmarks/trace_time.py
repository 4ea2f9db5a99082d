"""Seconds of CPU to trace and lower a training step, without and with a policy.

    python examples/benchmarks/trace_time.py
    python examples/benchmarks/trace_time.py --model ResNet-50

No step scales its loss. The ways take turns; the least of all rounds is printed, and
its ratio to float32. Nothing is compiled or run.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ways
from compiled_steps import abstract_arguments
from models import JOBS, Job

AUTOCAST = functools.partial(
    ways.with_jaxmp_unscaled, dtype=jnp.bfloat16, autocast=True
)
APPLY_POLICY = functools.partial(
    ways.with_jaxmp_unscaled, dtype=jnp.bfloat16, autocast=False
)
WAYS: dict[str, Callable[[Job], ways.Training]] = {
    "float32": ways.plain,
    "by hand": functools.partial(ways.by_hand, dtype=jnp.bfloat16),
    "apply_policy": APPLY_POLICY,
    "apply_policy, own_code=half": functools.partial(APPLY_POLICY, own_code="half"),
    "autocast": AUTOCAST,
    "autocast, named_scopes=False": functools.partial(AUTOCAST, named_scopes=False),
    "autocast, quantize=fp8": functools.partial(AUTOCAST, quantize="fp8"),
}


def seconds_to_lower(way: Callable[[Job], ways.Training], job: Job) -> float:
    """Makes a step anew, and times tracing and lowering it."""
    training = way(job)
    arguments = abstract_arguments(training, job)
    began = time.process_time()
    # A new function: JAX remembers what it traced.
    jax.jit(lambda *args: training.step(*args), donate_argnums=0).lower(*arguments)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="GPT-2 small", choices=list(JOBS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    job = JOBS[arguments.model]
    rounds = [
        {name: seconds_to_lower(way, job) for name, way in WAYS.items()}
        for _ in range(arguments.rounds)
    ]
    least = {name: min(times[name] for times in rounds) for name in WAYS}
    print(f"{arguments.model}, {job.shape}: seconds of CPU, ratio to float32")
    for name, seconds in least.items():
        print(f"{name:30} {seconds:6.2f} {seconds / least['float32']:6.2f}")


if __name__ == "__main__":
    main()
