"""A process that compiles one program, or compiles and times it, and says so in JSON.

`machine_steps.py` starts it. Each answer is one line; `time` waits for a line before it
touches the device, so that it measures alone.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import jax
from machine_records import Machine
from rounds import measured, warm_up


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def describe() -> dict[str, str]:
    """The fields of the `Machine` that programs run on."""
    device = jax.devices()[0]
    software = f"jax {jax.__version__}"
    driver = driver_version() if device.platform == "gpu" else ""
    machine = Machine(device.device_kind, device.platform, software, driver)
    return dataclasses.asdict(machine)


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.split("\n")[0].strip() if found.returncode == 0 else ""


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Arguments, results that do not take an argument's place, and temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def peak_bytes(device: jax.Device) -> int:
    """The most that the allocator has given out so far; 0 if the device cannot say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def compile_only(lowered: jax.stages.Lowered) -> dict[str, Any]:
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    return {"compile_seconds": seconds, "planned": planned_bytes(compiled)}


def compile_and_time(
    lowered: jax.stages.Lowered, arguments: Any, rounds: int, steps: int
) -> dict[str, Any]:
    """Takes what another process compiled from JAX's cache, and times it."""
    reused = []
    jax.monitoring.register_event_listener(
        lambda event, **_: reused.append(event.endswith("/cache_hits"))
    )
    compiled = lowered.compile()
    device = jax.devices()[0]
    state, batch = jax.block_until_ready(jax.device_put(arguments, device))
    # Compilers that try kernels on the device may have taken more than a step does.
    before = peak_bytes(device)
    loss = None

    def start() -> None:
        nonlocal state, loss
        state, loss = compiled(state, batch)

    def wait() -> None:
        jax.block_until_ready(state)

    start()
    first_loss = None if loss is None else float(loss)
    warm_up(start, wait)
    times = measured(start, wait, rounds=rounds, steps=steps)
    peak = peak_bytes(device)
    return {
        **times,
        "allocated": peak if peak > before else None,
        "loss": first_loss,
        "reused": any(reused),
    }


def work(arguments: argparse.Namespace) -> None:
    from machine_programs import Case, program  # the device is known before Flax is

    built = program(Case(arguments.model, arguments.way), tiny=arguments.tiny)
    began = time.perf_counter()
    lowered = jax.jit(built.step, donate_argnums=0).lower(*built.arguments)
    seconds = time.perf_counter() - began
    if arguments.role == "compile":
        say(shape=built.shape, trace_seconds=seconds, **compile_only(lowered))
        return
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        first = jax.block_until_ready(built.start())
    say(ready=True)
    if sys.stdin.readline():
        say(**compile_and_time(lowered, first, arguments.rounds, arguments.steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=["describe", "compile", "time"])
    parser.add_argument("--model")
    parser.add_argument("--way")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    try:
        say(**describe()) if arguments.role == "describe" else work(arguments)
    except Exception as error:  # a row of the table
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()
