"""Answers of compilers, kept on disk by program, target and the compiler's version."""

import gzip
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

import jax

from jaxmp.report.compile._programs import Program
from jaxmp.report.compile._worker import Answer


def load(program: Program) -> Answer | None:
    """The answer of an earlier run; None if there is none that can be read."""
    try:
        with gzip.open(_entry(program), "rt", encoding="utf-8") as file:
            return Answer(**json.load(file))
    except (OSError, EOFError, ValueError, TypeError):
        return None


def save(program: Program, answer: Answer) -> None:
    """Keeps an answer for later runs."""
    path = _entry(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(gzip.compress(json.dumps(answer._asdict()).encode()))
    # A reader sees the whole answer or none.
    Path(file.name).replace(path)


def _entry(program: Program) -> Path:
    versions = f"jax-{jax.__version__}-{_compiler_version(program)}"
    return _directory() / versions / f"{program.key}.json.gz"


def _directory() -> Path:
    """`$JAXMP_CACHE_DIR`, or `~/.cache/jaxmp/programs`."""
    if chosen := os.environ.get("JAXMP_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxmp" / "programs"


def _compiler_version(program: Program) -> str:
    name = "libtpu" if program.target.platform == "tpu" else "jax-cuda12-pjrt"
    try:
        return f"{name}-{importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return "none"
