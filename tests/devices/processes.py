"""Real processes that train together over loopback, each ended by a deadline."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jaxmp

WORKER = Path(__file__).with_name("worker.py")
DEVICES_EACH = 4
SECONDS = 120


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


class Processes:
    """Processes of one job; leaving the `with` block kills those that still run."""

    def __init__(self, job, folder, count=2):
        self.deadline = time.monotonic() + SECONDS
        self.folder = Path(folder)
        flags = f"--xla_force_host_platform_device_count={DEVICES_EACH}"
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(Path(jaxmp.__file__).parent.parent),
        }
        port = str(free_port())
        self.files = [self.folder / f"{job}_{i}" for i in range(count)]
        self.running = []
        for i, file in enumerate(self.files):
            command = [WORKER, job, port, str(i), str(count), str(folder)]
            with (
                file.with_suffix(".out").open("w") as out,
                file.with_suffix(".err").open("w") as err,
            ):
                process = subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=err,
                    env=env,
                    start_new_session=True,
                )
            self.running.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for i, process in enumerate(self.running):
            self.kill(i)
            process.stdin.close()

    def kill(self, i):
        """Ends a process, and what it has started, by SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running[i].pid, signal.SIGKILL)
        self.running[i].wait()

    def said(self, i, kind):
        """What a process has printed of one kind."""
        lines = self.files[i].with_suffix(".out").read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["kind"] == kind]

    def wait_until_said(self, kind):
        """Waits until every process has printed something of a kind."""
        while not all(self.said(i, kind) for i in range(len(self.running))):
            self.check([i for i, p in enumerate(self.running) if p.poll() is not None])
            time.sleep(0.05)

    def wait(self):
        """Waits for the end of all of them."""
        while any(process.poll() is None for process in self.running):
            self.check(
                [i for i, p in enumerate(self.running) if p.poll() not in (None, 0)]
            )
            time.sleep(0.05)
        self.check([i for i, p in enumerate(self.running) if p.poll() != 0])

    def check(self, failed):
        """Raises with what all have written if some failed or the time is over."""
        late = time.monotonic() > self.deadline
        if not (failed or late):
            return
        for i in range(len(self.running)):
            self.kill(i)
        texts = ["took too long" if late else f"process {failed} failed"]
        for file in self.files:
            for kind in (".out", ".err"):
                written = file.with_suffix(kind)
                texts.append(f"--- {written.name} ---\n{written.read_text()[-6000:]}")
        raise AssertionError("\n".join(texts))


def run(job, folder):
    """Runs a job to its end, and returns its processes, which have ended."""
    with Processes(job, folder) as processes:
        processes.wait()
    return processes
