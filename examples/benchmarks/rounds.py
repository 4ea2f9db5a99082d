"""Times rounds of training steps, whatever the library that runs them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[], float]
Call = Callable[[], None]

WARM_UP_STEPS, WARM_UP_SECONDS = 2, 0.5
"""Until an idle GPU runs at its full clock, and every buffer is where it stays."""


def warm_up(start: Call, wait: Call, *, clock: Clock = time.perf_counter) -> None:
    """Runs steps until the device runs as it does in the middle of a training."""
    began, steps = clock(), 0
    while steps < WARM_UP_STEPS or clock() - began < WARM_UP_SECONDS:
        start()
        wait()
        steps += 1


def measured(
    start: Call,
    wait: Call,
    *,
    rounds: int,
    steps: int,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Times rounds of steps that follow each other without a pause.

    Args:
      start: starts one step.
      wait: returns when the device has finished all that was started.
      rounds: how many are timed.
      steps: in each round.
      clock: the time in seconds.

    Returns:
      Fields of a record: `ms`, `host_ms` and `steps`.
    """
    wait()
    whole, host = [], []
    for _ in range(rounds):
        began = clock()
        for _ in range(steps):
            start()
        started = clock()
        wait()
        whole.append(1e3 * (clock() - began) / steps)
        host.append(1e3 * (started - began) / steps)
    return {"ms": whole, "host_ms": statistics.median(host), "steps": steps}
