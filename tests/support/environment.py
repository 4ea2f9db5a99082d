"""The environment in which tests start JAX, made from the one around them."""

from collections.abc import Mapping

HOST_DEVICES = "--xla_force_host_platform_device_count"
GPUS = ("cuda", "gpu", "rocm")
FOR_GPUS = (
    # Trying out kernels takes minutes, and picks other ones on another day.
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_deterministic_ops=true",
    # Triton's float32 matmuls are TF32 and cannot be talked out of it.
    "--xla_gpu_enable_triton_gemm=false",
)


def platform(environment: Mapping[str, str]) -> str:
    """Where the tests run: the first name in `JAX_PLATFORMS`."""
    return environment["JAX_PLATFORMS"].split(",")[0]


def environment_for(
    outer: Mapping[str, str], jaxlib: str, has_libtpu: bool
) -> dict[str, str]:
    """What to set before JAX starts: eight CPU devices, unless asked for others.

    Args:
        outer: The environment of the caller, whose `JAX_PLATFORMS`, host devices in
            `XLA_FLAGS`, and settings for NVIDIA and memory hold.
        jaxlib: The release of jaxlib, such as "0.10.2".
        has_libtpu: Whether the TPU compiler is installed.
    """
    platforms = (outer.get("JAX_PLATFORMS") or "cpu").split(",")
    # Callbacks and compile targets want the CPU beside the GPU.
    platforms += [] if "cpu" in platforms else ["cpu"]
    flags = outer.get("XLA_FLAGS", "").split()
    named = {flag.split("=")[0] for flag in flags}
    wanted = [f"{HOST_DEVICES}=8"]
    if platforms[0] in GPUS:
        wanted += FOR_GPUS
    # Compiling is most of the time, and much of that is the emitters of fusions, which
    # JAX 0.10 can do without. Later ones do not know the flag, nor does the TPU
    # compiler, and they stop at it.
    elif jaxlib.startswith("0.10.") and not has_libtpu:
        wanted += ["--xla_cpu_use_fusion_emitters=false"]
    flags += [flag for flag in wanted if flag.split("=")[0] not in named]
    usual = {
        # One process would take most of the GPU's memory, and there are two.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Float32 matmuls in float32, as on a CPU. `jax_default_matmul_precision` would
        # do that too, and change the programs under test.
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    return {
        **{name: outer.get(name, value) for name, value in usual.items()},
        "JAX_PLATFORMS": ",".join(platforms),
        "XLA_FLAGS": " ".join(flags),
        # The TPU and H100 compilers can be loaded beside the devices.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
