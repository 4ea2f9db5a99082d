"""Compiles an update step for TPU v5e and H100 and prints what it moves and keeps.

AdamW behind a clip by global norm, alone and under a loss scale that skips non-finite
steps; `optax.apply_if_finite` for comparison. Parameters and moments are float32 and
donated. Nothing runs: XLA's own compilers say how many bytes the program touches, how
many it needs for temporaries, and in how many passes over the weights it works.

    pip install 'jaxmp[targets]'
    python examples/benchmarks/update_traffic.py

`optax.apply_if_finite` takes float32 gradients only (the branches of its `cond` would
differ in dtype), so that every row is to be compared with rows of the same gradients.

- bytes: what XLA counts as accessed, per parameter. On the TPU it counts prefetches
  into VMEM too, which come and go with the shapes; the H100's compiler counts nothing.
- passes: kernels that read or write a whole weight, moment or gradient, per weight. Two
  is the least with a clip: one for the norm, one for the update.
"""

import os
import re
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import optax

import jaxmp
from jaxmp.report import compile_for

LEAVES, SHAPE = 24, (2048, 2048)  # 100 M parameters
TARGETS = ("tpu-v5e", "h100")


class Row(NamedTuple):
    """What one compiled update step costs; bytes are per parameter."""

    update: str
    grads: str
    target: str
    bytes: float | None
    temp: float
    passes: float


def cases():
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


def compile_update(tx, grads_dtype, target):
    """Compiles `(params, state, grads) -> (params, state)`, the first two donated."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def weights(dtype):
        shape = jax.ShapeDtypeStruct(SHAPE, dtype)
        return {f"w{i}": shape for i in range(LEAVES)}

    params = weights(jnp.float32)
    state = jax.eval_shape(tx.init, params)
    grads = weights(grads_dtype)
    return compile_for(target, step, params, state, grads, donate_argnums=(0, 1))


def weight_passes(hlo):
    """Counts the kernels of a program that touch an array of the weights' shape."""
    in_kernels = set(re.findall(r"calls=%([\w.\-]+)", hlo))
    whole = "[{},{}]".format(*SHAPE)
    types, kernels, computation = {}, [], None
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)", line)
        if match is None or computation in in_kernels:
            continue
        name, type_, operation, operands = match.groups()
        types[name] = type_
        if operation in ("fusion", "copy", "select", "multiply", "add", "reduce"):
            kernels.append((type_, re.findall(r"%([\w.\-]+)", operands)))
    touching = [
        type_
        for type_, operands in kernels
        if whole in type_ or any(whole in types.get(name, "") for name in operands)
    ]
    return len(touching) / LEAVES


def measure(update, grads, target):
    """Compiles one case for one target."""
    compiled = compile_update(cases()[update, grads], jnp.dtype(grads), target)
    parameters = LEAVES * SHAPE[0] * SHAPE[1]
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return Row(
        update,
        grads,
        target,
        bytes=None if accessed is None else accessed / parameters,
        temp=compiled.memory_analysis().temp_size_in_bytes / parameters,
        passes=weight_passes(compiled.as_text()),
    )


def table(rows):
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


def main():
    rows = [measure(*case, target) for target in TARGETS for case in cases()]
    print(table(rows))


if __name__ == "__main__":
    main()
