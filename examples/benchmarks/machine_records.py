"""What was measured on a machine: one line of JSON for each answer, added as it comes.

It needs nothing but Python, so that scripts for other libraries write the same.
"""

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

FOLDER = pathlib.Path("out", "machine_steps")
STEPS = "steps.jsonl"
TORCH = "torch.jsonl"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a step ran.

    Attributes:
      device: such as "NVIDIA H100 80GB HBM3".
      platform: such as "gpu" or "cpu".
      software: the library that ran the step, and its version.
      driver: the version of the GPU's driver; empty if unknown.
    """

    device: str
    platform: str
    software: str
    driver: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """What one program did on one machine, or why it did not.

    Attributes:
      model: what is trained.
      way: how.
      machine: where.
      shape: the batch and the optimizer in words.
      tiny: whether it is the small one, for tests.
      options: what it was compiled with.
      ms: milliseconds per step, one number for each round.
      host_ms: of these, what Python takes to start a step; as long as the step where
        the device waits for it.
      steps: steps in a round.
      planned: bytes that the compiler plans: arguments, results and temporaries.
      allocated: bytes that the device's allocator had given out at its peak.
      trace_seconds: to trace and lower.
      compile_seconds: to compile.
      reused: whether the process that was timed found what another had compiled.
      loss: of the first step, if it has one; ways that do the same work agree.
      error: why there are no figures; empty if there are.
    """

    model: str
    way: str
    machine: Machine
    shape: str = ""
    tiny: bool = False
    options: str = ""
    ms: tuple[float, ...] = ()
    host_ms: float | None = None
    steps: int = 0
    planned: int | None = None
    allocated: int | None = None
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    reused: bool | None = None
    loss: float | None = None
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later record of the same measurement replaces."""
        return self.machine, self.model, self.way, self.tiny, self.options


def add(record: Record, path: pathlib.Path) -> None:
    """Writes a record behind the others, and waits until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted run may have left half a line.
    text = path.read_text() if path.exists() else ""
    unfinished = text and not text.endswith("\n")
    with path.open("a") as file:
        file.write("\n" if unfinished else "")
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[pathlib.Path]) -> list[Record]:
    """The records of some files; of several with one key, the last.

    A line that an interrupted run left unfinished is passed over.
    """
    found = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                continue
            machine, ms = Machine(**fields.pop("machine")), tuple(fields.pop("ms"))
            record = Record(machine=machine, ms=ms, **fields)
            found[record.key] = record
    return list(found.values())
