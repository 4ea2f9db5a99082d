"""How near the milliseconds of `jaxmp.report` come to steps timed on an H100.

    pip install 'jaxmp[test,targets]'
    python examples/benchmarks/calibration.py --write docs/report.md

compiles five training steps for an H100, without one, fits the two constants of
`jaxmp.report.chips["h100"].calibration` to what was measured, and says how far off the
estimate is. It takes two minutes. On a machine with an H100 you can time them anew:

    python examples/benchmarks/calibration.py --measure

Both run without XLA's Triton matmuls, whose tuning takes minutes per program.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from compiled_steps import FLOAT32, WAYS, abstract_step
from compiled_updates import prepare_to_compile
from models import JOBS
from models._job import Job
from page import markdown_table, write_section

from jaxmp.report import chips, compile_step_of

BY_HAND, AUTOCAST = "bfloat16 by hand", "bfloat16 autocast"
# Milliseconds per step, the median of 5 rounds of 6, on one NVIDIA H100 80GB (SXM5)
# with jax 0.11.2 and flax 0.12.10; float32 is TensorFloat-32. Autocast's ResNet-50 was
# that of commit fc2e9a3.
MEASURED = {
    ("ResNet-50", FLOAT32): 24.9,
    ("ResNet-50", BY_HAND): 15.1,
    ("ResNet-50", AUTOCAST): 17.1,
    ("GPT-2 small", FLOAT32): 67.8,
    ("GPT-2 small", BY_HAND): 37.1,
}
OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}


class Timed(NamedTuple):
    """A step that was timed, and what the report counts in it.

    Attributes:
      model: its name.
      way: to train it.
      measured: seconds.
      peak: seconds that it would take at the chip's peaks, and without launches.
      operations: that the chip launches.
    """

    model: str
    way: str
    measured: float
    peak: float
    operations: float

    def estimate(self, share: float, launch: float) -> float:
        """Seconds, by the report's two constants."""
        return self.peak / share + self.operations * launch


def compiled(model: str, way: str) -> Timed:
    """Compiles a step for the H100 and reads it."""
    report = compile_step_of(
        functools.partial(abstract_step, model),
        policies=[way],
        targets=["h100"],
        donate_argnums=[0],
        compiler_options=OPTIONS,
    )
    found = report.rows[0].roofline
    if found is None:
        raise RuntimeError(f"The H100's compiler cannot write down {model}, {way}.")
    peak = (found.cost - found.launch_cost) / chips["h100"].bandwidth
    return Timed(model, way, MEASURED[model, way] / 1e3, peak, found.operations)


def fit(steps: Iterable[Timed]) -> tuple[float, float]:
    """The constants whose relative errors have the least squares.

    Returns:
      The share of the peaks, and seconds for each operation.
    """
    counted = [(x.peak / x.measured, x.operations / x.measured) for x in steps]
    slope, launch = np.linalg.lstsq(np.array(counted), np.ones(len(counted)))[0]
    return float(1 / slope), float(launch)


# Tables


def off(estimate: float, measured: float) -> str:
    return f"{100 * (estimate / measured - 1):+.1f} %"


def tables(steps: Sequence[Timed]) -> str:
    """What was measured against what is estimated."""
    calibration = chips["h100"].calibration
    if calibration is None:
        raise RuntimeError("chips['h100'] has no calibration; give it one.")
    constants = calibration.share_of_peaks, calibration.launch
    lines = []
    for step in steps:
        first = next(x for x in steps if x.model == step.model)
        estimate = step.estimate(*constants)
        others = [x for x in steps if x != step]
        another = [x for x in steps if x.model != step.model]
        lines.append(
            (
                f"{step.model}, {step.way}",
                f"{1e3 * step.measured:.1f}",
                f"{1e3 * estimate:.1f}",
                off(estimate, step.measured),
                off(step.estimate(*fit(others)), step.measured),
                off(step.estimate(*fit(another)), step.measured),
                f"{first.measured / step.measured:.2f}",
                f"{first.estimate(*constants) / estimate:.2f}",
                f"{first.peak / step.peak:.2f}",
            )
        )
    columns = (
        "step",
        "ms measured",
        "ms estimated",
        "off by",
        "fitted without it",
        "fitted to the other model",
        "speed-up measured",
        "estimated",
        "at the peaks",
    )
    share, launch = fit(steps)
    text = (
        f"Fitted to all five: {100 * share:.1f} % of the peaks, and "
        f"{1e6 * launch:.2f} microseconds for each operation."
    )
    return f"{markdown_table(columns, lines)}\n\n{text}"


# On a machine with an H100


def seconds_per_step(way: str, job: Job, rounds: int = 5, steps: int = 6) -> float:
    """Times a step on the device that JAX chooses; the median of some rounds."""
    training = WAYS[way](job)
    # Flax's `init` takes a GPU's compiler longer than the step.
    with jax.default_device(jax.devices("cpu")[0]):
        key = jax.random.key(0)
        held: Any = training.init(key), job.batch(key)
    state, batch = jax.device_put(held, jax.devices()[0])
    lowered = jax.jit(training.step, donate_argnums=0).lower(state, batch)
    is_gpu = jax.default_backend() == "gpu"
    step = lowered.compile(compiler_options=OPTIONS if is_gpu else None)
    state, loss = step(state, batch)
    times = []
    for _ in range(rounds):
        jax.block_until_ready((state, loss))
        began = time.perf_counter()
        for _ in range(steps):
            state, loss = step(state, batch)
        jax.block_until_ready((state, loss))
        times.append((time.perf_counter() - began) / steps)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time the steps here")
    parser.add_argument("--write", metavar="PAGE", help="put the table there")
    arguments = parser.parse_args()
    if arguments.measure:
        for (model, way), before in MEASURED.items():
            now = 1e3 * seconds_per_step(way, JOBS[model])
            print(f"{model}, {way}: {now:.1f} ms, before {before:.1f}", flush=True)
        return
    prepare_to_compile()
    text = tables([compiled(*case) for case in MEASURED])
    print(text)
    if arguments.write:
        write_section(arguments.write, "calibration", text)


if __name__ == "__main__":
    main()
