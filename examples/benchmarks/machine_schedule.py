"""Compiles many programs at once and times them one by one, within a given time."""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from machine_programs import Case

FIRST_WAVE, FIRST_TIMING = 20.0, 5.0
"""Seconds that a wave, and a timing in it, are thought to take before one is known."""


class Process(Protocol):
    """What `machine_process.Worker` does."""

    def answer(self, seconds: float) -> dict[str, Any]: ...
    def go(self) -> None: ...
    def end(self) -> None: ...


Launch = Callable[[str, Case], Process]
"""Starts a process for "compile" or "time" and a case."""
Save = Callable[[Case, dict[str, Any]], None]
"""Takes the fields of a record: the answers of a case, or its `error`."""


class Pair(NamedTuple):
    """The two processes of a case: one compiles and leaves, one waits and measures."""

    compiler: Process
    timer: Process

    def end(self) -> None:
        self.compiler.end()
        self.timer.end()


class Schedule:
    """Measures cases in waves, and begins none that would not end in time.

    Args:
      launch: starts processes.
      save: gets every answer when it arrives.
      seconds: for all of it.
      at_once: cases in a wave.
      clock: the time in seconds.
    """

    def __init__(
        self,
        launch: Launch,
        save: Save,
        *,
        seconds: float,
        at_once: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launch, self._save, self._clock = launch, save, clock
        self._at_once = at_once
        self._end = clock() + seconds
        self._last_wave, self._longest_timing = FIRST_WAVE, FIRST_TIMING

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - self._clock()

    def run(self, cases: Iterable[Case]) -> list[Case]:
        """Measures cases in their order; returns those for which no time was left."""
        waiting, not_taken = list(cases), []
        while waiting and self.left > self._last_wave:
            wave, waiting = waiting[: self._at_once], waiting[self._at_once :]
            began = self._clock()
            not_taken += self._measure(wave)
            self._last_wave = self._clock() - began
        return not_taken + waiting

    def _measure(self, wave: list[Case]) -> list[Case]:
        pairs: dict[Case, Pair] = {}
        try:
            for case in wave:
                compiler = self._launch("compile", case)
                pairs[case] = Pair(compiler, self._launch("time", case))
            reserve = self._longest_timing * len(wave)
            facts = {case: self._prepare(pairs[case], reserve) for case in wave}
            # Nothing else runs from here on: all compilers have left, all timers wait.
            return [case for case in wave if not self._time(case, pairs, facts[case])]
        finally:
            for pair in pairs.values():
                pair.end()

    def _prepare(self, pair: Pair, reserve: float) -> dict[str, Any] | None:
        """What the compiler says, or an error; None if it takes too long."""
        facts = None
        with contextlib.suppress(TimeoutError):
            found = pair.compiler.answer(self.left - reserve)
            pair.compiler.end()
            if "error" not in found:
                found |= pair.timer.answer(self.left - reserve)
            facts = found
        if facts is None or not facts.get("ready"):
            pair.end()
        return facts

    def _time(
        self, case: Case, pairs: dict[Case, Pair], facts: dict[str, Any] | None
    ) -> bool:
        """Saves what a case took, or why it failed; False if there was no time."""
        if facts is None:
            return False
        if "error" not in facts:
            if self.left < self._longest_timing:
                return False
            began, timer = self._clock(), pairs[case].timer
            timer.go()
            try:
                facts = facts | timer.answer(self.left)
            except TimeoutError:
                return False
            timer.end()
            self._longest_timing = max(self._longest_timing, self._clock() - began)
        self._save(case, facts)
        return True
