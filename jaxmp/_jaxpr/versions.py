"""What depends on the installed JAX release: its version, and the shape of jaxprs."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxmp._jaxpr.types import Jaxpr
from jaxmp.errors import UnsupportedJaxVersion

OLDEST_JAX = (0, 10, 0)


def check_jax_version(version: str = jax.__version__) -> None:
    """Raises `UnsupportedJaxVersion` unless `version` is at least `OLDEST_JAX`."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise UnsupportedJaxVersion(
            f"jaxmp needs JAX {oldest} or newer, and JAX {version} is installed. "
            f"Update it: pip install --upgrade 'jax>={oldest}'"
        )


check_jax_version()


def open_jaxpr(jaxpr: Jaxpr) -> Any:
    """The jaxpr without its constants; from JAX 0.12 on, there is one class only."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def jaxpr_consts(jaxpr: Jaxpr) -> Sequence[Any]:
    """The constants of a jaxpr, in the order of its `constvars`."""
    return getattr(jaxpr, "consts", ())


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carries a scan has, from its parameters."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    raise UnsupportedJaxVersion(
        f"JAX {jax.__version__} describes a scan by {sorted(params)}, which this "
        "version of jaxmp cannot read. Update jaxmp, or install jax<0.13."
    )


def shard_map_arguments(params: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `jax.shard_map` that give these parameters."""
    names = {"mesh", "in_specs", "out_specs", "check_vma", "newly_manual_axes"}
    if set(params) - {"jaxpr"} != names:
        raise UnsupportedJaxVersion(
            f"JAX {jax.__version__} describes a shard_map by {sorted(params)}, which "
            "this version of jaxmp cannot read. Update jaxmp, or install jax<0.13."
        )
    arguments = {name: params[name] for name in names - {"newly_manual_axes"}}
    return {**arguments, "axis_names": set(params["newly_manual_axes"])}


CUDNN_ATTENTION = "jax._src.nn.functions.cudnn_dot_product_attention"
"""What `jax.nn.dot_product_attention` calls with `implementation="cudnn"`.

It is called by this name however the function around it is held, as by a `partial`.
"""
