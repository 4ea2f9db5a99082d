"""Training steps as XLA's compilers made them, kept on disk.

Some take ten minutes to compile, so that every answer is written down when it arrives.
"""

import functools
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import ways
from models import JOBS

import jaxmp
from jaxmp.report import compile_step_of

STORE = pathlib.Path("out", "memory_table")
TARGETS = ("h100", "tpu-v5e", "tpu-v6e")

# Without a GPU to try on, XLA 0.10's Triton path takes tiles that do not fit
# Transformer-XL's heads of 41, and fails. The library of matmuls takes any.
COMPILER_OPTIONS = {
    ("Transformer-XL base", "h100"): {"xla_gpu_enable_triton_gemm": False}
}


def moments_in_half(inner):
    """The optimizer with moments in bfloat16, rounded at random."""
    return jaxmp.cast_state(inner, "bfloat16", rounding="stochastic")


def all_state_in_half(inner):
    """The same, and master weights in two halves: no float32 is stored."""
    return jaxmp.master_weights(moments_in_half(inner), split=True)


AUTOCAST = functools.partial(ways.with_jaxmp, autocast=True)
APPLY_POLICY = functools.partial(ways.with_jaxmp, autocast=False)
FLOAT32 = "float32"
IN_HALF = {
    f"{dtype} {name}": functools.partial(way, dtype=jnp.dtype(dtype))
    for dtype in ("bfloat16", "float16")
    for name, way in {
        "by hand": ways.by_hand,
        "jmp": ways.with_jmp,
        "apply_policy": APPLY_POLICY,
        "autocast": AUTOCAST,
    }.items()
}
SAVING_MORE = {
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
# The H100's half matmuls are padded to multiples of 8, and the padded copies are kept.
NOT_PADDED = {
    f"{way}, not padded": {**IN_HALF, **SAVING_MORE}[way]
    for way in (
        "bfloat16 by hand",
        "bfloat16 autocast",
        "bfloat16 autocast, half moments",
    )
}
WAYS = {FLOAT32: ways.plain, **IN_HALF, **NOT_PADDED, **SAVING_MORE}


def ways_for(model: str, target: str) -> list[str]:
    """What the table shows: on TPUs nobody trains in float16."""
    if target != "h100":
        return [FLOAT32, *(way for way in IN_HALF if way.startswith("bfloat16"))]
    odd_sizes = NOT_PADDED if model == "Transformer-XL base" else ()
    return [FLOAT32, *IN_HALF, *SAVING_MORE, *odd_sizes]


def compiler_options(model: str, way: str, target: str) -> dict[str, Any]:
    options = dict(COMPILER_OPTIONS.get((model, target), {}))
    if way in NOT_PADDED:
        options["xla_disable_hlo_passes"] = "cublas-pad-for-gemms"
    return options


def row(model: str, way: str, target: str, *, only_stored: bool = False) -> Any:
    """Compiles a step, unless that was done.

    Returns:
      What a `jaxmp.report.Row` tells; None if it is not stored and nothing shall be
      compiled.
    """
    path = STORE / f"{target} {model} {way}.json".replace(",", "").replace(" ", "_")
    if not path.exists():
        if only_stored:
            return None
        report = compile_step_of(
            functools.partial(abstract_step, model),
            policies=[way],
            targets=[target],
            donate_argnums=[0],
            compiler_options=compiler_options(model, way, target),
            cache=False,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_rows()[0], indent=1))
    return json.loads(
        path.read_text(), object_hook=lambda told: types.SimpleNamespace(**told)
    )


def abstract_step(model: str, way: str) -> tuple[Any, Any, Any]:
    """The step of a model, and the shapes of its state and its batch."""
    job = JOBS[model]
    training = WAYS[way](job)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(training.init, key)
    return training.step, state, jax.eval_shape(job.batch, key)
