"""Processes that answer in lines of JSON, and the environment that all of them get."""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

WORKER = pathlib.Path(__file__).with_name("machine_worker.py")
WITHOUT_TRITON = "--xla_gpu_enable_triton_gemm=false"


def environment(cache: str, *, autotune: bool) -> dict[str, str]:
    """This process's environment, and what all workers share.

    Args:
      cache: folder in which one process finds what another compiled.
      autotune: whether XLA tries Triton's matmuls, which takes minutes per program.
    """
    given = dict(os.environ)
    platforms = given.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        # First states are made there.
        given["JAX_PLATFORMS"] = f"{platforms},cpu"
    if not autotune:
        given["XLA_FLAGS"] = f"{given.get('XLA_FLAGS', '')} {WITHOUT_TRITON}".strip()
    return given | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Many are on the device at once.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


class Worker:
    """A process of `machine_worker.py`.

    Args:
      arguments: its command line.
      env: its environment.
    """

    def __init__(self, arguments: Sequence[str], env: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer; one with `error` if the process fails or dies.

        Raises:
          TimeoutError: if there is none after so many seconds.
        """
        try:
            return self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeoutError(f"no answer in {seconds:.0f} s") from None

    def go(self) -> None:
        """Lets a process that waits measure now."""
        with contextlib.suppress(BrokenPipeError):
            print("go", file=self._process.stdin, flush=True)

    def end(self) -> None:
        """Ends it, whatever it does, so that it leaves the device."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _listen(self) -> None:
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):
                    if isinstance(found := json.loads(line), dict):
                        self._answers.put(found)
        code = self._process.wait()
        self._answers.put({"error": f"ended with status {code}: {self._last_words()}"})

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        self._log.close()
        return lines[-1][:300] if lines else "it said nothing"
