"""Compiles an update step for TPU v5e and H100 and prints what it moves and keeps.

AdamW behind a clip by global norm, alone and under a loss scale that skips non-finite
steps; `optax.apply_if_finite` for comparison. The 100 M parameters and their moments
are float32 and donated. Nothing runs: XLA's own compilers say how many bytes the
program touches, how many it needs for temporaries, and in how many passes over the
weights it works.

    pip install 'jaxmp[targets]'
    python examples/benchmarks/update_traffic.py

`optax.apply_if_finite` takes float32 gradients only (the branches of its `cond` would
differ in dtype). Compare each row with rows of the same gradients.

- bytes: what XLA counts as accessed, per parameter. On the TPU it counts prefetches
  into VMEM too, which come and go with the shapes; the H100's compiler counts nothing.
- passes: kernels that read or write a whole weight, moment or gradient, per weight. Two
  is the least with a clip: one for the norm, one for the update.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from compiled_updates import (
    Weights,
    bytes_accessed,
    compile_update,
    kernels,
    prepare_to_compile,
    temporary_bytes,
)

import jaxmp

WEIGHTS = Weights(leaves=24, shape=(2048, 2048))
TARGETS = ("tpu-v5e", "h100")


class Row(NamedTuple):
    """What one compiled update step costs; bytes are per parameter."""

    update: str
    grads: str
    target: str
    bytes: float | None
    temp: float
    passes: float


def cases() -> dict[tuple[str, str], optax.GradientTransformation]:
    """Maps (name of the update, dtype of its gradients) to a transformation."""
    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    scaled = jaxmp.loss_scaling(clipped, "mixed_float16")
    unscaling = jaxmp.loss_scaling(clipped, "mixed_float16", grads_are_scaled=True)
    unguarded = jaxmp.loss_scaling(clipped, "mixed_bfloat16", skip_nonfinite=False)
    return {
        ("clip + adamw", "float16"): clipped,
        ("loss_scaling(clip + adamw)", "float16"): scaled,
        ("loss_scaling, grads_are_scaled", "float16"): unscaling,
        ("loss_scaling, scale 1, no skip", "float16"): unguarded,
        ("clip + adamw", "float32"): clipped,
        ("loss_scaling(clip + adamw)", "float32"): scaled,
        ("apply_if_finite(clip + adamw)", "float32"): optax.apply_if_finite(clipped, 5),
        ("adamw", "float32"): adamw,
        ("loss_scaling(adamw)", "float32"): jaxmp.loss_scaling(adamw, "mixed_float16"),
        ("apply_if_finite(adamw)", "float32"): optax.apply_if_finite(adamw, 5),
    }


def weight_passes(hlo: str) -> float:
    """Kernels of a program that touch an array of the weights' shape, per weight."""
    whole = "[{},{}]".format(*WEIGHTS.shape)
    touching = [k for k in kernels(hlo) if whole in " ".join([k.result, *k.operands])]
    return len(touching) / WEIGHTS.leaves


def measure(update: str, grads: str, target: str) -> Row:
    """Compiles one case for one target."""
    compiled = compile_update(
        cases()[update, grads],
        WEIGHTS,
        target,
        params_dtype=jnp.float32,
        grads_dtype=grads,
    )
    accessed = bytes_accessed(compiled)
    return Row(
        update,
        grads,
        target,
        bytes=None if accessed is None else accessed / WEIGHTS.parameters,
        temp=temporary_bytes(compiled) / WEIGHTS.parameters,
        passes=weight_passes(compiled.as_text() or ""),
    )


def table(rows: Iterable[Row]) -> str:
    """Lays the rows out as text."""
    lines = [
        "update                         | grads   | target  | bytes |  temp | passes"
    ]
    for row in rows:
        accessed = "" if row.bytes is None else f"{row.bytes:.2f}"
        lines.append(
            f"{row.update:30} | {row.grads} | {row.target:7} | {accessed:>5} | "
            f"{row.temp:5.3f} | {row.passes:6.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    prepare_to_compile()
    rows = [measure(*case, target) for target in TARGETS for case in cases()]
    print(table(rows))


if __name__ == "__main__":
    main()
