"""Training steps as XLA's compilers made them, kept on disk.

Some take ten minutes to compile, so every answer is written down when it arrives.
"""

import functools
import json
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import ways
from models import JOBS, Job

import jaxmp
from jaxmp.report import compile_step_of
from jaxmp.report._rows import Row

STORE = pathlib.Path("out", "memory_table")
TARGETS = ("h100", "tpu-v5e", "tpu-v6e")

# Without a GPU to try on, XLA 0.10's Triton path takes tiles that do not fit
# Transformer-XL's heads of 41, and fails. The library of matmuls takes any.
COMPILER_OPTIONS = {
    ("Transformer-XL base", "h100"): {"xla_gpu_enable_triton_gemm": False}
}


# Ways to train, by the names that they have in the tables


def moments_in_half(inner: optax.GradientTransformation) -> Any:
    """The optimizer with moments in bfloat16, rounded at random."""
    return jaxmp.cast_state(inner, "bfloat16", rounding="stochastic")


def all_state_in_half(inner: optax.GradientTransformation) -> Any:
    """The same, and master weights in two halves: no float32 is stored."""
    return jaxmp.master_weights(moments_in_half(inner), split=True)


AUTOCAST = functools.partial(ways.with_jaxmp, autocast=True)
APPLY_POLICY = functools.partial(ways.with_jaxmp, autocast=False)
BFLOAT16_AUTOCAST = functools.partial(AUTOCAST, dtype=jnp.bfloat16)
UNSCALED = functools.partial(ways.with_jaxmp_unscaled, dtype=jnp.bfloat16)

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
        BFLOAT16_AUTOCAST, optimizer=moments_in_half
    ),
    "bfloat16 autocast, 8 bytes per parameter": functools.partial(
        BFLOAT16_AUTOCAST, optimizer=all_state_in_half, param_dtype=jnp.bfloat16
    ),
}
QUANTIZED = {
    "float8 autocast": functools.partial(BFLOAT16_AUTOCAST, quantize="fp8"),
    "int8 autocast": functools.partial(BFLOAT16_AUTOCAST, quantize="int8"),
}
WITHOUT_LOSS_SCALING = {
    "bfloat16 apply_policy, unscaled": functools.partial(UNSCALED, autocast=False),
    "bfloat16 autocast, unscaled": functools.partial(UNSCALED, autocast=True),
    "bfloat16 autocast, unscaled, half_residuals=False": functools.partial(
        UNSCALED, autocast=True, half_residuals=False
    ),
}
OWN_CODE_IN_HALF = {
    "bfloat16 apply_policy, own_code=half": functools.partial(
        APPLY_POLICY, dtype=jnp.bfloat16, own_code="half"
    )
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
WAYS: dict[str, Callable[[Job], ways.Training]] = {
    FLOAT32: ways.plain,
    **IN_HALF,
    **SAVING_MORE,
    **QUANTIZED,
    **WITHOUT_LOSS_SCALING,
    **OWN_CODE_IN_HALF,
    **NOT_PADDED,
}


def ways_for(model: str, target: str) -> list[str]:
    """What the table shows: on TPUs nobody trains in float16."""
    on_gpu = target == "h100"
    in_half = [way for way in IN_HALF if on_gpu or way.startswith("bfloat16")]
    saving_more = SAVING_MORE if on_gpu else ()
    unscaled = WITHOUT_LOSS_SCALING if model == "GPT-2 small" else ()
    odd_sizes = NOT_PADDED if on_gpu and model == "Transformer-XL base" else ()
    return [FLOAT32, *in_half, *saving_more, *unscaled, *odd_sizes]


def compiler_options(model: str, way: str, target: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(COMPILER_OPTIONS.get((model, target), {}))
    if way in NOT_PADDED:
        options["xla_disable_hlo_passes"] = "cublas-pad-for-gemms"
    return options


# Steps and what their compilers said


def abstract_arguments(training: ways.Training, job: Job) -> tuple[Any, Any]:
    """The shapes of a state and a batch."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(training.init, key), jax.eval_shape(job.batch, key)


def abstract_step(model: str, way: str) -> tuple[Any, Any, Any]:
    """The step of a model, and the shapes of its state and its batch."""
    training = WAYS[way](JOBS[model])
    return training.step, *abstract_arguments(training, JOBS[model])


def gpt2_small(policy: str) -> tuple[Any, ...]:
    """The same for `python -m jaxmp`: float32, or autocast under a mixed policy."""
    job, given = JOBS["GPT-2 small"], jaxmp.get_policy(policy)
    if given.compute_dtype == jnp.float32:
        training = ways.plain(job)
    else:
        reduce = given.reduce_dtype
        training = AUTOCAST(job, given.compute_dtype, reduce_dtype=reduce)
    step = jax.jit(training.step, donate_argnums=0)
    return step, *abstract_arguments(training, job)


def row(model: str, way: str, target: str, *, only_stored: bool = False) -> Row | None:
    """Compiles a step, unless it is stored.

    Returns:
      The report's row; None if it is not stored and `only_stored`.
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
    stored = json.loads(
        path.read_text(), object_hook=lambda fields: types.SimpleNamespace(**fields)
    )
    return Row(**vars(stored))
