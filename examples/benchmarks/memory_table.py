"""What precision saves in training four well-known models, by XLA's own compilers.

BERT-Base, GPT-2 small, ResNet-50 and Transformer-XL base are compiled for an H100, a
TPU v5e and a TPU v6e, which need none of these machines. Nothing runs.

    pip install 'jaxmp[test,targets]'
    python examples/benchmarks/memory_table.py --target h100
    python examples/benchmarks/memory_table.py --write docs/benchmarks.md

Every compiled program is kept in `out/memory_table`, so that a run can be interrupted,
and the page be written again without a compiler. All of it takes some hours.
"""

import argparse
import functools
import gzip
import json
import os
import pathlib
import time
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import ways
from models import JOBS

import jaxmp
from jaxmp.report import compile_for

GIB = 2.0**30
TARGETS = ("h100", "tpu-v5e", "tpu-v6e")
STORE = pathlib.Path("out", "memory_table")
AUTOCAST = functools.partial(ways.with_jaxmp, autocast=True)
APPLY_POLICY = functools.partial(ways.with_jaxmp, autocast=False)

# XLA 0.10's Triton path cannot tile Transformer-XL's heads of 41, if it may not try on
# a real GPU what works. The library of matmuls takes them.
COMPILER_OPTIONS = {
    ("Transformer-XL base", "h100"): {"xla_gpu_enable_triton_gemm": False}
}


def moments_in_half(inner):
    """The optimizer with moments in bfloat16, rounded at random."""
    return jaxmp.cast_state(inner, "bfloat16", rounding="stochastic")


def all_state_in_half(inner):
    """The same, and master weights split in two halves: 8 bytes per parameter."""
    return jaxmp.master_weights(moments_in_half(inner), split=True)


WAYS = {
    "float32": ways.plain,
    "bfloat16 by hand": functools.partial(ways.by_hand, dtype=jnp.bfloat16),
    "bfloat16 jmp": functools.partial(ways.with_jmp, dtype=jnp.bfloat16),
    "bfloat16 apply_policy": functools.partial(APPLY_POLICY, dtype=jnp.bfloat16),
    "bfloat16 autocast": functools.partial(AUTOCAST, dtype=jnp.bfloat16),
    "float16 by hand": functools.partial(ways.by_hand, dtype=jnp.float16),
    "float16 jmp": functools.partial(ways.with_jmp, dtype=jnp.float16),
    "float16 apply_policy": functools.partial(APPLY_POLICY, dtype=jnp.float16),
    "float16 autocast": functools.partial(AUTOCAST, dtype=jnp.float16),
    "bfloat16 autocast, half moments": functools.partial(
        AUTOCAST, dtype=jnp.bfloat16, optimizer=moments_in_half
    ),
    "bfloat16 autocast, 8 bytes per parameter": functools.partial(
        AUTOCAST,
        dtype=jnp.bfloat16,
        optimizer=all_state_in_half,
        param_dtype=jnp.bfloat16,
    ),
}


class Program(NamedTuple):
    """What a compiler made of a training step."""

    memory: dict[str, int]
    costs: dict[str, float]
    text: str
    seconds: float
    error: str
    jax: str

    @property
    def peak(self) -> float:
        """Arguments and temporary memory in GiB; results are in donated arguments."""
        kept = self.memory["output"] - self.memory["alias"]
        return (self.memory["argument"] + self.memory["temp"] + kept) / GIB


def path_of(model: str, way: str, target: str) -> pathlib.Path:
    name = f"{target} {model} {way}".replace(",", "").replace(" ", "_")
    return STORE / f"{name}.json.gz"


def load(model: str, way: str, target: str) -> Program | None:
    """Reads what was compiled before, if it was."""
    path = path_of(model, way, target)
    if not path.exists():
        return None
    return Program(**json.loads(gzip.decompress(path.read_bytes())))


def compile_program(model: str, way: str, target: str) -> Program:
    """Compiles a step and keeps what the compiler said; a refusal is an answer too."""
    job = JOBS[model]
    training = WAYS[way](job)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state, batch = jax.eval_shape(training.init, key), jax.eval_shape(job.batch, key)
    options = COMPILER_OPTIONS.get((model, target))
    start = time.perf_counter()
    memory: dict[str, int] = {}
    costs: dict[str, float] = {}
    text = error = ""
    try:
        compiled = compile_for(
            target,
            training.step,
            state,
            batch,
            donate_argnums=0,
            compiler_options=options,
        )
    except jax.errors.JaxRuntimeError as failure:
        error = str(failure)
    else:
        stats = compiled.memory_analysis()
        kinds = ("argument", "output", "alias", "temp")
        memory = {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in kinds}
        costs = {k: v for k, v in (compiled.cost_analysis() or {}).items() if " " in k}
        text = compiled.as_text()
    seconds = time.perf_counter() - start
    program = Program(memory, costs, text, seconds, error, jax.__version__)
    path = path_of(model, way, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(program._asdict()).encode()))
    return program


def describe(program: Program) -> str:
    if program.error:
        return f"refused: {program.error.splitlines()[0][:100]}"
    accessed = program.costs.get("bytes accessed", 0) / GIB
    return f"peak {program.peak:.3f} GiB, accessed {accessed:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--model", action="append", choices=list(JOBS))
    parser.add_argument("--way", action="append", choices=list(WAYS))
    arguments = parser.parse_args()
    for target in arguments.target or TARGETS:
        for model in arguments.model or JOBS:
            for way in arguments.way or WAYS:
                program = load(model, way, target) or compile_program(
                    model, way, target
                )
                print(
                    f"{target:8} {model:20} {way:40} {describe(program)} "
                    f"({program.seconds:.0f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
