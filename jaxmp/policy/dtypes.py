"""The names of dtypes, and which of them a device is good at."""

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
"""Every dtype that a policy may name: the name that `str` prints, then aliases."""

name_to_dtype = MappingProxyType(
    {name: dtype for dtype, names in dtype_to_names.items() for name in names}
)
"""The same table the other way round."""


def half_dtype() -> Any:
    """Returns the half-precision dtype of the default device, as jmp chose it.

    Returns:
      `jnp.bfloat16` on a TPU and `jnp.float16` elsewhere. Calling it starts JAX's
      backend. `get_policy("auto")` asks more closely what the device is good at.

    Example:
      >>> import jaxmp
      >>> jaxmp.half_dtype().dtype.itemsize
      2
    """
    return jnp.bfloat16 if jax.local_devices()[0].platform == "tpu" else jnp.float16


def read_dtype(dtype: Any) -> np.dtype | None:
    """Reads a dtype, scalar type or name; None for what no policy may name."""
    if isinstance(dtype, str):
        dtype = half_dtype() if dtype == "half" else name_to_dtype.get(dtype)
    # NumPy would take the dtype of an array, and read None as float64.
    if not isinstance(dtype, (type, np.dtype)):
        return None
    try:
        scalar_type = jnp.dtype(dtype).type
    except (TypeError, ValueError):
        return None
    # Made anew from its scalar type: JAX has no other byte order than the native one.
    return jnp.dtype(scalar_type) if scalar_type in dtype_to_names else None


def policy_name_for(device: Any) -> str:
    """Names the policy whose matmuls are fastest on a device without losing range.

    TPUs, NVIDIA GPUs from Ampere on (compute capability 8.0; "CUDA C++ Programming
    Guide", table of arithmetic instructions) and AMD's from MI200 and RDNA 3 on
    multiply bfloat16 at full rate. Volta and Turing have float16 Tensor Cores only.
    CPUs emulate both, and of anything else nothing is known: float32.

    Args:
      device: a `jax.Device`. Nothing but `platform` and `compute_capability` is read.

    Returns:
      `"mixed_bfloat16"`, `"mixed_float16"` or `"float32"`.

    Example:
      >>> import jax
      >>> from jaxmp.policy import policy_name_for
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
