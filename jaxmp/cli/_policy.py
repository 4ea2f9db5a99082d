"""What a policy means: its dtypes, its range and rounding, and its loss scale."""

import argparse
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmp._views import html as _html
from jaxmp._views import tables as _table
from jaxmp.cli._output import Output
from jaxmp.policy import Policy, get_policy
from jaxmp.report.compile.chips import format_of, where_native
from jaxmp.report.compile.progress import Progress

KINDS = ("loss-scaling", "half-params")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "policy",
        help='such as mixed_float16, bf16-mixed or "params=float32,compute=bfloat16"',
    )


def run(options: argparse.Namespace, progress: Progress) -> Output:
    """Explains the policy."""
    progress.say(f"reading {options.policy}")
    policy = get_policy(options.policy)
    data = describe(policy)
    rows = [(name, str(value)) for name, value in data.items()]
    kinds = set()
    if data["loss scale"] != "none":
        kinds.add("loss-scaling")
    if _is_half(policy.param_dtype):
        kinds.add("half-params")
    page = _html.writer(f"Policy {options.policy}", _html.table(("", "policy"), rows))
    return Output(
        text=_table.text_table(("", "policy"), rows),
        data=data,
        to_html=page,
        kinds=frozenset(kinds),
    )


def describe(policy: Policy) -> dict[str, Any]:
    """What a policy means: an answer for each question."""
    compute = jnp.finfo(policy.compute_dtype)
    half = _is_half(policy.param_dtype)
    quantized = {}
    if policy.quantize is not None:
        quantized = {"matmuls with weights": _multiplied(policy.quantize)}
    return {
        "written out": str(policy),
        "parameters": jnp.dtype(policy.param_dtype).name,
        "compute": jnp.dtype(policy.compute_dtype).name,
        "outputs": jnp.dtype(policy.output_dtype).name,
        **quantized,
        "matmul precision": str(policy.matmul_precision or "the device's default"),
        "gradients summed over devices in": str(
            jnp.dtype(policy.reduce_dtype or policy.compute_dtype)
        ),
        "largest number": f"{float(compute.max):.6g}",
        "smallest normal number": f"{float(compute.tiny):.6g}",
        "relative rounding": f"{float(compute.eps) / 2:.3g}",
        "bytes per parameter": jnp.dtype(policy.param_dtype).itemsize,
        "loss scale": _loss_scale(policy),
        "master weights": (
            "needed: jaxmp.master_weights(optimizer)" if half else "not needed"
        ),
    }


def _multiplied(quantize: str) -> str:
    """The format of the matmuls, and where it is multiplied natively."""
    name = format_of(quantize)
    return f"{name} on {where_native(name)}; half elsewhere"


def _loss_scale(policy: Policy) -> str:
    if jnp.dtype(policy.compute_dtype) != jnp.float16:
        return "none"
    import inspect

    from jaxmp.loss_scale import dynamic_loss_scaling

    defaults = inspect.signature(dynamic_loss_scaling).parameters
    first, interval = (
        defaults[name].default for name in ("init_scale", "growth_interval")
    )
    return f"dynamic: starts at {first:g}, doubles after {interval} good steps"


def _is_half(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype).itemsize < 4
