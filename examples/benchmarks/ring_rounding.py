"""Prints what a sum over devices loses, by the dtype that it is made in.

    python examples/benchmarks/ring_rounding.py

A ring is simulated: a partial sum goes from device to device, and each adds its own
part and rounds. The parts are a gradient that all devices share plus noise of the same
size, as batches give it. The figures are relative errors, by norm.
"""

import jax.numpy as jnp
import numpy as np
from page import markdown_table

DEVICES = (8, 64, 512)
SIZE = 1 << 14
RINGS = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "bfloat16 parts, added up in float32": ("bfloat16", "float32"),
    "float32": ("float32", "float32"),
}
"""The dtype of each device's part, and that of the sum."""


def ring_error(devices: int, part: str, total: str) -> float:
    """Relative error of a sum of gradients.

    Args:
      devices: how many add their parts.
      part: dtype to which each part is rounded.
      total: dtype to which the sum is rounded after each addition.
    """
    generator = np.random.default_rng(0)
    shared = generator.standard_normal(SIZE)
    parts = shared + generator.standard_normal((devices, SIZE))
    parts = parts.astype(np.float32)
    exact = parts.astype(np.float64).sum(0)
    rounded = parts.astype(jnp.dtype(part))
    ring = rounded[0].astype(jnp.dtype(total))
    for mine in rounded[1:]:
        both = ring.astype(np.float32) + mine.astype(np.float32)
        ring = both.astype(jnp.dtype(total))
    error = np.linalg.norm(ring.astype(np.float64) - exact)
    return float(error / np.linalg.norm(exact))


def rounding_table() -> str:
    """Lays out the errors, as Markdown."""
    rows = [
        [name, *(f"{ring_error(n, *dtypes):.1e}" for n in DEVICES)]
        for name, dtypes in RINGS.items()
    ]
    return markdown_table(["summed in", *(f"{n} devices" for n in DEVICES)], rows)


if __name__ == "__main__":
    print(rounding_table())
