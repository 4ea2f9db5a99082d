"""Reports on standard error what is being done, and how long it will take."""

import sys
import threading
import time
from types import TracebackType


class Progress:
    """Reports what is being done; compiling for one machine may take minutes.

    Lines are plain, so that logs and notebooks show them as a terminal does. As a
    context manager it says nothing more after the end, also if `patience` is over then.

    Args:
      shown: whether to report anything; by default only in a terminal.
      patience: seconds in which it says nothing. Whatever is being done when they are
        over is reported then, and from there on everything is.

    Attributes:
      shown: whether anything is reported.
    """

    def __init__(self, shown: bool | None = None, patience: float = 0.0):
        self.shown = sys.stderr.isatty() if shown is None else shown
        self._start = time.monotonic()
        self._seconds: list[float] = []
        self._left = 0
        self._lock = threading.Lock()
        self._doing = ""
        self._timer = None
        if self.shown and patience > 0:
            self._timer = threading.Timer(patience, self._lose_patience)
            self._timer.daemon = True
            self._timer.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Says nothing more, unless patience was lost already."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._doing = ""

    def hurry(self) -> None:
        """Reports everything from now on: what follows takes long."""
        if self._timer is not None:
            self._timer.cancel()
            self._lose_patience()

    def say(self, what: str) -> None:
        """Writes a line, with the seconds since the beginning."""
        with self._lock:
            self._doing = what
            if self._timer is None:
                self._write()

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

    def _lose_patience(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer = None
                if self._doing:
                    self._write()

    def _write(self) -> None:
        if self.shown:
            passed = time.monotonic() - self._start
            print(f"[{passed:4.0f} s] {self._doing}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A length of time for people, such as `"3 min"`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
