"""Reports on standard error what is being done, and how long it will take."""

import sys
import time


class Progress:
    """Reports what is being done; compiling for one machine may take minutes.

    Lines are plain, so that logs and notebooks show them as a terminal does.

    Args:
      shown: whether to report anything; by default only in a terminal.

    Attributes:
      shown: whether anything is reported.
    """

    def __init__(self, shown: bool | None = None):
        self.shown = sys.stderr.isatty() if shown is None else shown
        self._start = time.monotonic()
        self._seconds: list[float] = []
        self._left = 0

    def say(self, what: str) -> None:
        """Writes a line, with the seconds since the beginning."""
        if self.shown:
            passed = time.monotonic() - self._start
            print(f"[{passed:4.0f} s] {what}", file=sys.stderr, flush=True)

    def expect(self, count: int) -> None:
        """Notes how many programs have to be compiled."""
        self._left = count

    def compiled(self, what: str, seconds: float) -> None:
        """Reports that a program is compiled, and how long the others will take."""
        self._seconds.append(seconds)
        self._left -= 1
        mean = sum(self._seconds) / len(self._seconds)
        left = f"; about {duration(mean * self._left)} left" if self._left else ""
        self.say(f"{what}: compiled in {duration(seconds)}{left}")


def duration(seconds: float) -> str:
    """A length of time for people, such as `"3 min"`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
