"""The names of matmul algorithms, which change speed and accuracy but no dtype."""

from typing import Any

import jax

_PRECISIONS = {
    "default": jax.lax.Precision.DEFAULT,
    "high": jax.lax.Precision.HIGH,
    "highest": jax.lax.Precision.HIGHEST,
    "bfloat16": jax.lax.Precision.DEFAULT,
    "bfloat16_3x": jax.lax.Precision.HIGH,
    "tensorfloat32": jax.lax.Precision.HIGH,
    "float32": jax.lax.Precision.HIGHEST,
}
_ALIASES = {"tf32": "tensorfloat32", "bf16": "bfloat16", "f32": "float32"}


def precision_names() -> tuple[str, ...]:
    """Lists every name that `read_precision` takes."""
    presets = (preset.name for preset in jax.lax.DotAlgorithmPreset)
    return (*_ALIASES, *_PRECISIONS, *presets)


def read_precision(precision: Any) -> str | None:
    """Returns the canonical name of a precision, or None for anything else."""
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return precision.name
    if isinstance(precision, str) and precision in precision_names():
        return _ALIASES.get(precision, precision)
    return None


def lax_precision(name: str) -> jax.lax.Precision | jax.lax.DotAlgorithmPreset:
    """Returns the `precision=` of `jax.lax.dot_general` for a canonical name."""
    if name in _PRECISIONS:
        return _PRECISIONS[name]
    return jax.lax.DotAlgorithmPreset[name]
