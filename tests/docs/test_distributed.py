"""The page on several devices: its program for two processes, and its tables."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import ring_rounding
import sharded_memory

import jaxmp

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
SECONDS = 120


def section(name):
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", PAGE, re.S)
    return found[1]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def run_processes(program, folder, count=2):
    """What processes print that run a program together, each with two devices."""
    script = folder / "train.py"
    script.write_text(program)
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(jaxmp.__file__).parents[1]),
    }
    address = f"localhost:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, script, address, str(count), str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(count)
    ]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    # What connects them prints lines of its own.
    return [printed.splitlines()[-1] for printed, _ in ended]


def test_the_program_for_two_processes_trains_alike_in_both(tmp_path):
    (program,) = re.findall(r"^```python\n(import sys\n.*?)^```", PAGE, re.M | re.S)
    first, second = run_processes(program, tmp_path)
    assert first == second
    assert re.fullmatch(r"loss 0\.\d{4}, skipped 0", first)


def test_the_table_of_rounding_is_the_one_that_is_printed():
    assert section("rounding") == ring_rounding.rounding_table()


def test_the_table_of_what_is_stored_is_the_one_that_is_printed():
    assert section("stored") == sharded_memory.stored_table()
