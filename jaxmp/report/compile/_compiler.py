"""Compiles programs in a process of their own, and remembers what was said."""

import contextlib
import gzip
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import jax

from jaxmp.errors import CompilerFailed
from jaxmp.report.compile._programs import Program
from jaxmp.report.compile._worker import Answer, Request, compile_request
from jaxmp.report.compile.progress import Progress
from jaxmp.report.compile.targets import TARGET_ENVIRONMENT, check_packages

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_TAIL_LINES = 15
_COMPILE = "from jaxmp.report.compile._worker import main; main()"


def cache_directory() -> Path:
    """Where answers of compilers are kept: `$JAXMP_CACHE_DIR`, or `~/.cache/jaxmp`."""
    if chosen := os.environ.get("JAXMP_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxmp" / "programs"


def compile_programs(
    programs: Sequence[Program],
    *,
    names: Sequence[str] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> list[Answer]:
    """Compiles programs, one after the other, and keeps what the compilers said.

    Args:
      programs: what to compile.
      names: what to call each; by default by its target.
      cache: whether answers of earlier runs are used and those of this one kept.
      progress: what says how far it has come; by default in a terminal.

    Returns:
      An answer for each program. One that does not fit into the memory of its target
      is an answer, too: its `error` says so.

    Raises:
      MissingTargetPackage: if a compiler is not installed.
      CompilerFailed: if a compiler fails for another reason than memory.
    """
    answers = [_load(program) if cache else None for program in programs]
    for program, answer in zip(programs, answers, strict=True):
        if answer is None:
            check_packages(program.target)
    progress = progress or Progress()
    progress.expect(answers.count(None))
    names = names or [str(program.target) for program in programs]
    with _Worker() as worker:
        for i, (program, name) in enumerate(zip(programs, names, strict=True)):
            what = f"{i + 1} of {len(programs)}: {name}"
            if answers[i] is not None:
                progress.say(f"{what}: known from an earlier run")
                continue
            progress.say(f"{what}: compiling")
            start = time.monotonic()
            answers[i] = _compile(program, worker)
            progress.compiled(what, time.monotonic() - start)
            if cache:
                _save(program, answers[i])
    return [answer for answer in answers if answer is not None]


def is_out_of_memory(answer: Answer) -> bool:
    """Whether a program was refused because it does not fit into memory."""
    return _OUT_OF_MEMORY in answer.error


def _compile(program: Program, worker: "_Worker") -> Answer:
    request = Request(
        str(program.target),
        program.written,
        program.is_exported,
        program.donated,
        program.mesh,
        program.options,
    )
    is_local = program.target.is_local
    answer = compile_request(request) if is_local else worker.ask(request)
    if answer.error and not is_out_of_memory(answer):
        raise CompilerFailed(
            f"The compiler for {str(program.target)!r} was given a program of "
            f"{len(program.written) / 2**20:.1f} MiB with {len(program.arguments)} "
            f"arguments, and failed:\n{answer.error.strip()}"
        )
    return answer


class _Worker:
    """The compiling process; started when it is first needed."""

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
        told = self.process.stdout.readline()
        if not told:
            self.process.communicate()
            status, self.process = self.process.returncode, None
            last = "\n".join(log.read_text(errors="replace").split("\n")[-_TAIL_LINES:])
            error = f"The process ended with status {status}. Its last words:\n{last}"
            return Answer({}, {}, "", 0.0, error)
        return Answer(*pickle.loads(path.with_suffix(".answer").read_bytes()))


def _start(log: Path) -> subprocess.Popen[str]:
    # Two libtpus do no harm to each other where there is no TPU.
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
            [
                sys.executable,
                "-c",
                _COMPILE,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
        )


def _entry(program: Program) -> Path:
    versions = f"jax-{jax.__version__}-{_compiler_version(program)}"
    return cache_directory() / versions / f"{program.key}.json.gz"


def _compiler_version(program: Program) -> str:
    name = "libtpu" if program.target.platform == "tpu" else "jax-cuda12-pjrt"
    try:
        return f"{name}-{importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _load(program: Program) -> Answer | None:
    try:
        with gzip.open(_entry(program), "rt", encoding="utf-8") as file:
            return Answer(**json.load(file))
    except (OSError, EOFError, ValueError, TypeError):
        return None


def _save(program: Program, answer: Answer | None) -> None:
    if answer is None:
        return
    path = _entry(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(gzip.compress(json.dumps(answer._asdict()).encode()))
    # A reader sees the whole answer or none.
    Path(file.name).replace(path)
