"""`get_policy`: reads a policy from a string."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jmp

from jaxmp.errors import PolicyError
from jaxmp.policy._matmul_precision import precision_names, read_precision
from jaxmp.policy._policy import Policy, PolicyLike
from jaxmp.policy._suggestions import near_policy, near_value
from jaxmp.policy.dtypes import name_to_dtype, policy_name_for, read_dtype
from jaxmp.policy.quantize import NOT_QUANTIZED, RECIPES, read_quantize

PRESETS = MappingProxyType(
    {
        "mixed_bfloat16": "p=f32,c=bf16,o=f32",
        "mixed_float16": "p=f32,c=f16,o=f32",
        "bf16-mixed": "p=f32,c=bf16,o=f32",
        "16-mixed": "p=f32,c=f16,o=f32",
        "32-true": "p=f32,c=f32,o=f32",
        "bf16-true": "p=bf16,c=bf16,o=bf16",
        "16-true": "p=f16,c=f16,o=f16",
        "64-true": "p=f64,c=f64,o=f64",
        **{f"mixed_{name}": f"p=f32,c=bf16,o=f32,quantize={name}" for name in RECIPES},
    }
)
"""The policy names of Keras and Lightning, those of `quantize=`, and what they stand
for."""

_FIELD_OF_KEY = {
    "p": "param_dtype",
    "params": "param_dtype",
    "c": "compute_dtype",
    "compute": "compute_dtype",
    "o": "output_dtype",
    "output": "output_dtype",
    "matmul": "matmul_precision",
    "reduce": "reduce_dtype",
    "quantize": "quantize",
}
_VALUES: Mapping[str, tuple[Callable[[str], Any], str, Callable[[], Any]]] = (
    MappingProxyType(
        {
            "matmul_precision": (read_precision, "matmul precision", precision_names),
            "quantize": (read_quantize, "format", lambda: (*RECIPES, NOT_QUANTIZED)),
        }
    )
)
"""How the values of the fields that are no dtypes are read, what these are called, and
which there are."""
_DTYPES = ("half", *name_to_dtype)
_NAMES = ("auto", *PRESETS, *_DTYPES)


def get_policy(spec: PolicyLike, *, device: Any = None) -> Policy:
    """Reads a policy from a string; policies pass through.

    Args:
      spec: one of

        - key=value parts in any order: `"params=float32,compute=bfloat16"`, or, for
          short, `"p=f32,c=bf16,o=f32"`. `params` defaults to float32, `compute` to
          params, `output` to compute. `matmul=tf32` chooses the matmuls' algorithm,
          `reduce=float32` the dtype in which devices add up gradients, and
          `quantize=fp8` a smaller format for the matmuls with weights.
        - a name of Keras or Lightning: `"mixed_bfloat16"`, `"mixed_float16"`,
          `"bf16-mixed"`, `"16-mixed"`, `"32-true"`, `"bf16-true"`, `"16-true"`. The
          mixed ones return float32.
        - `"mixed_fp8"` or `"mixed_int8"`: mixed_bfloat16 with matmuls in float8 or
          int8. `"mixed_fp8:hybrid"`, `"mixed_fp8:rowwise"`,
          `"mixed_fp8:rowwise_wgrad_half"` and `"mixed_int8:wgrad_half"` vary them.
        - one dtype for everything: `"float32"`, `"bf16"`, `"half"`, or a dtype.
        - `"auto"`: mixed_bfloat16, mixed_float16 or float32, whichever the device
          multiplies fastest without losing range.
        - a name or dtype, followed by parts that change it: `"float32,matmul=tf32"`.
        - a `Policy` or `jmp.Policy`, which passes through.
      device: the `jax.Device` that `"auto"` decides for; the first local one by
        default.

    Returns:
      A `Policy`; `get_policy(str(policy)) == policy`.

    Raises:
      PolicyError: for anything else; it points at the part that is wrong.

    Example:
      >>> import jaxmp
      >>> str(jaxmp.get_policy("mixed_bfloat16"))
      'p=full,c=bf16,o=full'
      >>> str(jaxmp.get_policy("compute=f16, output=f32"))
      'p=full,c=f16,o=full'
    """
    if isinstance(spec, Policy):
        return spec
    if isinstance(spec, jmp.Policy):
        return Policy(spec.param_dtype, spec.compute_dtype, spec.output_dtype)
    if isinstance(spec, str):
        try:
            return _parse(spec, device)
        except PolicyError as error:
            if repr(spec) in str(error):
                raise
            message = f"{error} It is written in the policy {spec!r}."
            raise PolicyError(message) from None
    dtype = read_dtype(spec)
    if dtype is None and hasattr(spec, "loss_scale") and hasattr(spec, "unscale"):
        raise PolicyError(
            f"{type(spec).__name__}(...) is a loss scale, and not a policy: it says "
            "nothing about dtypes. Name the policy here, such as 'mixed_float16', and "
            "give the scale to the optimizer: jaxmp.loss_scaling(optimizer, scale)."
        )
    if dtype is None:
        raise PolicyError(
            f"A policy is a string, a dtype or a Policy, not {spec!r}. "
            f"Write one of: {', '.join(_NAMES)}; or 'p=f32,c=bf16,o=f32'."
        )
    return Policy(dtype, dtype, dtype)


def _parse(spec: str, device: Any) -> Policy:
    base: dict[str, Any] = {}
    assigned: dict[str, Any] = {}
    start = 0
    for part in spec.split(","):
        if "=" in part:
            field, value = _read_assignment(spec, start, part)
            if field in assigned:
                raise _error(spec, start, part, f"{field} is given twice")
            assigned[field] = value
        elif start == 0:
            base = _read_name(spec, part, device)
        else:
            raise _error(spec, start, part, "Expected key=value", keys=True)
        start += len(part) + 1
    fields = {**base, **assigned}
    fields.setdefault("param_dtype", "float32")
    fields.setdefault("compute_dtype", fields["param_dtype"])
    fields.setdefault("output_dtype", fields["compute_dtype"])
    return Policy(**fields)


def _read_assignment(spec: str, start: int, part: str) -> tuple[str, Any]:
    left, right = part.split("=", 1)
    key, text = left.strip(), right.strip()
    if key not in _FIELD_OF_KEY:
        raise _error(spec, start, left, f"Unknown key {key!r}", keys=True)
    field = _FIELD_OF_KEY[key]
    read, kind, allowed = _VALUES.get(field, (read_dtype, "dtype", lambda: _DTYPES))
    value = read(text)
    if value is None:
        problem = f"Unknown {kind} {text!r}"
        raise _error(spec, start + len(left) + 1, right, problem, allowed())
    return field, value


def _read_name(spec: str, part: str, device: Any) -> dict[str, Any]:
    name = part.strip()
    if name == "auto":
        name = policy_name_for(device or jax.local_devices()[0])
    if name.startswith("mixed_"):
        read_quantize(name.removeprefix("mixed_"))  # raises for what is reserved
    if name in PRESETS:
        policy = _parse(PRESETS[name], device)
        return {
            "param_dtype": policy.param_dtype,
            "compute_dtype": policy.compute_dtype,
            "output_dtype": policy.output_dtype,
            "quantize": policy.quantize,
        }
    dtype = read_dtype(name)
    if dtype is None:
        problem = f"Unknown dtype or policy name {name!r}"
        raise _error(spec, 0, part, problem, _NAMES, keys=True)
    return dict.fromkeys(("param_dtype", "compute_dtype", "output_dtype"), dtype)


def _error(
    spec: str,
    start: int,
    part: str,
    problem: str,
    allowed: Iterable[str] = (),
    *,
    keys: bool = False,
) -> PolicyError:
    """Quotes the spec, points at the wrong part, and lists what may stand there."""
    text = part.strip()
    start += len(part) - len(part.lstrip())
    lines = [f"{problem} in policy {spec!r}:"]
    if spec.isprintable():
        lines += [f"    {spec}", "    " + " " * start + "^" * max(len(text), 1)]
    allowed = tuple(allowed)
    if allowed == _NAMES:
        near = near_policy(text, allowed)
    else:
        near = near_value(text, allowed or _FIELD_OF_KEY)
    if near:
        lines.append(near)
    if allowed:
        lines.append(f"Allowed here: {', '.join(allowed)}.")
    if keys:
        lines.append(
            "Keys: params (p), compute (c), output (o), matmul, reduce, quantize; "
            "for example 'p=f32,c=bf16,o=f32'."
        )
    return PolicyError("\n".join(lines))
