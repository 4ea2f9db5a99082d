"""The names of `quantize=`: in which small format matmuls are multiplied."""

from typing import Any

import numpy as np

from jaxmp import _tree
from jaxmp.errors import PolicyError

RECIPES = (
    "fp8",
    "fp8:hybrid",
    "fp8:rowwise",
    "fp8:rowwise_wgrad_half",
    "int8",
    "int8:wgrad_half",
)
"""What a policy may name. The parts after the colon change what stands before it."""

_RESERVED = {"fp8:mx": "MXFP8", "fp8:block": "blocks of 128 numbers"}

NOT_QUANTIZED = "none"
"""What a rule names to leave matmuls in half."""


def check_quantize(name: Any, compute: np.dtype) -> str | None:
    """Reads `quantize` of a policy.

    Args:
      name: one of `RECIPES`, `"none"`, or None.
      compute: the compute dtype of the same policy.

    Returns:
      One of `RECIPES`, or None.

    Raises:
      PolicyError: for another name, or a compute dtype that is not half.
    """
    read = None if name is None else read_quantize(name)
    if name is not None and read is None:
        raise PolicyError(
            f"Unknown quantize {name!r} in a policy. Write one of: "
            f"{', '.join((*RECIPES, NOT_QUANTIZED))}."
        )
    if read in (None, NOT_QUANTIZED):
        return None
    if compute not in _tree.HALF:
        raise PolicyError(
            f"quantize={name!r} does not fit compute_dtype={compute}: only matmuls in "
            "half are multiplied in a smaller format. Write compute=bfloat16 beside it."
        )
    return read


def check_compute_dtype(dtype: np.dtype) -> None:
    """Raises `PolicyError` if a policy or a rule computes in bare float8."""
    if dtype.itemsize == 1:
        raise PolicyError(
            f"compute_dtype={dtype} would round every value to float8 without a "
            "scale: sums would stop growing, and numbers above 448 would be NaN. Write "
            "'mixed_fp8', which multiplies in float8 under scales and computes all "
            "else in bfloat16."
        )


def read_quantize(name: Any) -> str | None:
    """Reads `quantize=` of a policy or a rule; None for what is none of its names.

    Raises:
      PolicyError: for a name that is reserved.
    """
    if not isinstance(name, str):
        return None
    if name in _RESERVED:
        raise PolicyError(
            f"quantize={name!r} is reserved for scales by {_RESERVED[name]}, which no "
            "compiler of JAX multiplies natively yet. Write one of: "
            f"{', '.join(RECIPES)}."
        )
    return name if name in (*RECIPES, NOT_QUANTIZED) else None
