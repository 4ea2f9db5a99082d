"""Compiles programs in a process of its own."""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from jaxmp.errors import CompilerFailed
from jaxmp.report.compile import _cache
from jaxmp.report.compile._programs import Program
from jaxmp.report.compile._worker import Answer, Request, compile_request
from jaxmp.report.compile.progress import Progress
from jaxmp.report.compile.targets import TARGET_ENVIRONMENT, check_packages

_TAIL_LINES = 15
_COMPILE = "from jaxmp.report.compile._worker import main; main()"


def compile_programs(
    programs: Sequence[Program],
    *,
    names: Sequence[str] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> list[Answer]:
    """Compiles programs one after the other, and keeps the compilers' answers.

    Args:
      programs: what to compile.
      names: what to call each in messages; by default by its target.
      cache: whether to use answers of earlier runs and keep those of this one.
      progress: reports how far it has come; by default in a terminal.

    Returns:
      An answer for each program. One that does not fit into the memory of its target
      has an answer, too: its `error` says so.

    Raises:
      MissingTargetPackage: if a compiler is not installed.
      CompilerFailed: if a compiler fails for another reason than memory.
    """
    known = [_cache.load(program) if cache else None for program in programs]
    for program, answer in zip(programs, known, strict=True):
        if answer is None:
            check_packages(program.target)
    progress = progress or Progress()
    progress.expect(known.count(None))
    names = names or [str(program.target) for program in programs]
    answers = []
    with _Worker() as worker:
        for i, (program, answer) in enumerate(zip(programs, known, strict=True)):
            what = f"{i + 1} of {len(programs)}: {names[i]}"
            if answer is None:
                progress.say(f"{what}: compiling")
                start = time.monotonic()
                answer = _compile(program, worker)
                progress.compiled(what, time.monotonic() - start)
                if cache:
                    _cache.save(program, answer)
            else:
                progress.say(f"{what}: known from an earlier run")
            answers.append(answer)
    return answers


def _compile(program: Program, worker: "_Worker") -> Answer:
    request = Request(
        target=str(program.target),
        written=program.written,
        is_exported=program.is_exported,
        donated=program.donated,
        mesh=program.mesh,
        options=program.options,
    )
    is_local = program.target.is_local
    answer = compile_request(request) if is_local else worker.ask(request)
    if answer.error and not answer.is_out_of_memory:
        raise CompilerFailed(
            f"The compiler for {str(program.target)!r} was given a program of "
            f"{len(program.written) / 2**20:.1f} MiB with {len(program.arguments)} "
            f"arguments, and failed:\n{answer.error.strip()}"
        )
    return answer


class _Worker:
    """The compiling process, started when it is first needed."""

    def __init__(self):
        self.process: subprocess.Popen[str] | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="jaxmp-")

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.folder.cleanup()

    def ask(self, request: Request) -> Answer:
        """Compiles a program in the process."""
        folder = Path(self.folder.name)
        log = folder / "log"
        if self.process is None:
            self.process = _start(log)
        path = folder / f"{time.monotonic_ns()}.request"
        path.write_bytes(pickle.dumps(tuple(request)))
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(path, file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            self.process.communicate()
            status, self.process = self.process.returncode, None
            last = "\n".join(log.read_text(errors="replace").split("\n")[-_TAIL_LINES:])
            return Answer.failure(
                f"The process ended with status {status}. Its last words:\n{last}"
            )
        return Answer(*pickle.loads(path.with_suffix(".answer").read_bytes()))


def _start(log: Path) -> subprocess.Popen[str]:
    # Two libtpus do not harm each other where there is no TPU.
    environment = {
        **os.environ,
        **TARGET_ENVIRONMENT,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    # Neither profiling flags nor virtual devices of this process belong there.
    environment.pop("XLA_FLAGS", None)
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _COMPILE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
        )
