"""Times rounds of training steps, whatever the library that runs them."""

import time
from collections.abc import Callable


def milliseconds(
    start: Callable[[], None],
    wait: Callable[[], None],
    *,
    rounds: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, ...]:
    """Milliseconds per step in each round of steps that follow without a pause.

    Args:
      start: starts one step.
      wait: returns when the device has finished all that was started.
      rounds: how many are timed.
      steps: in each round.
      clock: the time in seconds.
    """
    wait()
    times = []
    for _ in range(rounds):
        began = clock()
        for _ in range(steps):
            start()
        wait()
        times.append(1e3 * (clock() - began) / steps)
    return tuple(times)
