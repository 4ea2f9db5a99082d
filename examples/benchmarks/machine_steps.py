"""Times training steps, and AdamW's update alone, on the machine that it runs on.

GPT-2, ResNet-50, BERT and Transformer-XL train in every way of `ways.py`, in float32,
bfloat16 and float16. A process of its own compiles each step, several at once; then
each is timed alone, from weights that were made on the CPU. The most important come
first, every answer is stored when it arrives, and a later run goes on from there.

    pip install -e . && pip install "jax[cuda12]"
    python examples/benchmarks/machine_steps.py --seconds 280 --write docs/benchmarks.md
    python examples/benchmarks/machine_steps.py --tiny --way float32 --records out/tiny

Nothing begins that does not fit into `--seconds`; what is left out is listed. XLA's
tuning of Triton's matmuls takes minutes per program and is off, for all ways alike,
without `--autotune`. Convolutions and cuBLAS are tuned while other programs compile;
`--at-once 1` gives each of them the device alone, and takes longer.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import machine_page
import machine_records
from machine_page import CPU_REMARK
from machine_process import WITHOUT_TRITON, Worker, environment
from machine_programs import MODELS, UPDATE, UPDATES, WAYS, Case, cases
from machine_records import Machine, Record
from machine_schedule import Schedule
from page import GIB, write_section

MOST_AT_ONCE = 8
"""Compilers at once: each holds half a GiB of the device, and what it tunes with."""


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=[*MODELS, UPDATE])
    parser.add_argument("--way", action="append", choices=[*WAYS, *UPDATES])
    parser.add_argument("--seconds", type=float, default=280, help="for all of it")
    parser.add_argument("--at-once", type=int, help="programs compiled at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps in a round")
    parser.add_argument("--autotune", action="store_true", help="tune Triton's matmuls")
    parser.add_argument("--tiny", action="store_true", help="small models, for tests")
    parser.add_argument("--retry", action="store_true", help="what failed, too")
    parser.add_argument("--stored", action="store_true", help="time nothing")
    parser.add_argument(
        "--records", type=pathlib.Path, default=machine_records.FOLDER, metavar="FOLDER"
    )
    parser.add_argument("--write", metavar="PAGE", help="put the tables there")
    arguments = parser.parse_args()
    if arguments.tiny and arguments.write:
        parser.error("--write takes full models: leave --tiny away.")
    return arguments


def measure(arguments: argparse.Namespace, path: pathlib.Path) -> None:
    """Times what is not stored in a file yet, and adds it there."""
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as cache:
        env = environment(cache, autotune=arguments.autotune)
        machine = ask_for_machine(env)
        print(f"{machine.device}, {machine.software}, driver {machine.driver or '?'}")
        if machine.platform == "cpu":
            if arguments.write:
                raise SystemExit(f"--write needs an accelerator. {CPU_REMARK}")
            print(CPU_REMARK)
        if machine.platform == "tpu":
            raise SystemExit(
                f"{machine.device} lets one process in at a time, and this command "
                "compiles and times in several. Run it on a GPU."
            )
        options = "" if arguments.autotune else WITHOUT_TRITON
        blank = functools.partial(
            Record, machine=machine, tiny=arguments.tiny, options=options
        )
        stored = machine_records.read([path])
        known = {r.key for r in stored if not (r.error and arguments.retry)}
        wanted = [
            case
            for case in cases(arguments.model or (), arguments.way or ())
            if blank(*case).key not in known
        ]
        size = ("--tiny",) if arguments.tiny else ()

        def launch(role: str, case: Case) -> Worker:
            names = ("--model", case.model, "--way", case.way)
            counts = (f"--rounds={arguments.rounds}", f"--steps={arguments.steps}")
            return Worker([role, *names, *counts, *size], env)

        def save(case: Case, facts: dict[str, Any]) -> None:
            names = facts.keys() & {field.name for field in dataclasses.fields(Record)}
            record = blank(*case, **{name: facts[name] for name in names})
            machine_records.add(record, path)
            print(f"{schedule.left:4.0f} s left | {describe(record)}", flush=True)

        schedule = Schedule(
            launch,
            save,
            seconds=end - time.monotonic(),
            at_once=arguments.at_once or min(MOST_AT_ONCE, os.cpu_count() or 1),
        )
        for case in schedule.run(wanted):
            print(f"not taken    | {case.model:20} {case.way}")


def ask_for_machine(env: dict[str, str]) -> Machine:
    """Which machine programs run on; this process must not hold its memory."""
    worker = Worker(["describe"], env)
    try:
        answer = worker.answer(seconds=60)
    finally:
        worker.end()
    if "error" in answer:
        raise SystemExit(f"JAX found no device: {answer['error']}")
    return Machine(**answer)


def describe(record: Record) -> str:
    names = f"{record.model:20} {record.way:34}"
    if record.error:
        return f"{names} {record.error}"
    sizes = {"planned": record.planned, "allocated": record.allocated}
    memory = "".join(f", {k} {x / GIB:.2f} GiB" for k, x in sizes.items() if x)
    return (
        f"{names} {record.median:8.2f} ms ({min(record.ms):.2f} to "
        f"{max(record.ms):.2f}){memory}, traced in {record.trace_seconds:.1f} s, "
        f"compiled in {record.compile_seconds:.1f} s"
        f"{'' if record.reused else ', and again to be timed'}"
    )


def main() -> None:
    arguments = read_flags()
    jax.config.update("jax_platforms", "cpu")  # the device is for the workers
    names = machine_records.STEPS, machine_records.TORCH
    paths = [arguments.records / name for name in names]
    if not arguments.stored:
        measure(arguments, paths[0])
    records = machine_records.read(paths)
    records = [record for record in records if record.tiny == arguments.tiny]
    print("\n" + (machine_page.tables(records) or machine_page.NOTHING))
    if arguments.write:
        write_section(arguments.write, "machine", machine_page.page_section(records))


if __name__ == "__main__":
    main()
