"""The names of dtypes, and which dtypes a device is fast in."""

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

dtype_to_names = MappingProxyType(
    {
        jnp.bfloat16: ("bf16", "bfloat16"),
        jnp.float16: ("f16", "float16", "fp16"),
        jnp.float32: ("full", "f32", "float32", "fp32"),
        jnp.float64: ("f64", "float64", "fp64"),
        jnp.float8_e4m3fn: ("float8_e4m3fn",),
        jnp.float8_e5m2: ("float8_e5m2",),
    }
)
"""The dtypes that a policy may have: the name that `str` prints, then aliases."""

name_to_dtype = MappingProxyType(
    {name: dtype for dtype, names in dtype_to_names.items() for name in names}
)
"""The same table, by name."""


def half_dtype() -> Any:
    """Returns the half-precision dtype of the default device, as jmp chose it.

    Returns:
      `jnp.bfloat16` on a TPU and `jnp.float16` elsewhere. The call starts JAX's
      backend. `get_policy("auto")` looks more closely at what the device is fast in.

    Example:
      >>> import jaxmp
      >>> jaxmp.half_dtype().dtype.itemsize
      2
    """
    return jnp.bfloat16 if jax.local_devices()[0].platform == "tpu" else jnp.float16


def read_dtype(dtype: Any) -> np.dtype | None:
    """Reads a dtype, scalar type or name; None for one that no policy may have."""
    if isinstance(dtype, str):
        dtype = half_dtype() if dtype == "half" else name_to_dtype.get(dtype)
    # NumPy would read an array as its dtype, and None as float64.
    if not isinstance(dtype, (type, np.dtype)):
        return None
    try:
        scalar_type = jnp.dtype(dtype).type
    except (TypeError, ValueError):
        return None
    # Made anew from its scalar type, since JAX has the native byte order only.
    return jnp.dtype(scalar_type) if scalar_type in dtype_to_names else None


def policy_name_for(device: Any) -> str:
    """Names the policy with the fastest matmuls on a device that keep their range.

    TPUs, NVIDIA GPUs from Ampere on (compute capability 8.0; "CUDA C++ Programming
    Guide", table of arithmetic instructions) and AMD GPUs from MI200 and RDNA 3 on
    multiply bfloat16 at full rate. Volta and Turing have float16 Tensor Cores only.
    CPUs emulate both; they and unknown devices get float32.

    Args:
      device: a `jax.Device`. Only `platform` and `compute_capability` are read.

    Returns:
      `"mixed_bfloat16"`, `"mixed_float16"` or `"float32"`.

    Example:
      >>> import jax
      >>> from jaxmp.policy.dtypes import policy_name_for
      >>> policy_name_for(jax.devices("cpu")[0])
      'float32'
    """
    if device.platform == "tpu":
        return "mixed_bfloat16"
    if device.platform not in ("gpu", "cuda", "rocm"):
        return "float32"
    capability = str(getattr(device, "compute_capability", ""))
    if capability.startswith("gfx"):
        has_bfloat16 = capability[3:].startswith(("90a", "94", "95", "11", "12"))
        return "mixed_bfloat16" if has_bfloat16 else "mixed_float16"
    major = int(capability.split(".")[0]) if capability[:1].isdigit() else 0
    if major >= 8:
        return "mixed_bfloat16"
    return "mixed_float16" if major == 7 else "float32"
