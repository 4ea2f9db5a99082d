"""Which functions autocast traces on half operands: those it knows, and users' own."""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.versions import CUDNN_ATTENTION
from jaxmp.errors import AutocastRuleError, RuleAlreadyRegistered


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that is traced on half operands.

    Attributes:
      name: where it is, `"package.module.function"` or `"package.module.Class.method"`.
      operands: the parameters that are narrowed; None for all.
      dtypes: the half dtypes that it takes.
      is_imported: whether modules import it under names of their own.
      value: the function itself, for one that is not found by its name.
    """

    name: str
    operands: tuple[str, ...] | None = None
    dtypes: frozenset[np.dtype] = _tree.HALF
    is_imported: bool = True
    value: Any = None


class Place(NamedTuple):
    """Where a function is held: a module or a class, the name in it, and what is there.

    `owner` is None for a function that is not found by its name.
    """

    owner: Any
    name: str
    value: Any


_PALLAS = "jax.experimental.pallas.ops"
_QKV = ("q", "k", "v")
# TPUs load no float16 in a kernel: under a float16 policy it stays in float32.
_BFLOAT16 = frozenset([np.dtype(jnp.bfloat16)])
# A bias stays in float32 where a kernel adds it in float32. Decoding is left alone: its
# cache would be cast as a whole in each step.
_KNOWN = (
    Function(CUDNN_ATTENTION, ("query", "key", "value", "bias"), is_imported=False),
    Function(f"{_PALLAS}.tpu.flash_attention.flash_attention", _QKV, _BFLOAT16),
    Function(
        f"{_PALLAS}.tpu.splash_attention.splash_attention_kernel."
        "SplashAttentionKernel.__call__",
        _QKV,
        _BFLOAT16,
    ),
    Function(f"{_PALLAS}.gpu.attention.mha", _QKV),
    Function(f"{_PALLAS}.gpu.attention_mgpu.attention", _QKV),
    Function(f"{_PALLAS}.gpu.attention_mgpu.attention_with_pipeline_emitter", _QKV),
)
_registered: dict[str, Function] = {}


def known() -> Iterator[Function]:
    """The functions that are traced on half operands."""
    yield from _KNOWN
    yield from list(_registered.values())


def version() -> int:
    """Changes whenever a function is registered."""
    return len(_registered)


def register(function: Any) -> None:
    """Adds a function, or the dotted name of one; see `register_rule`."""
    new = _read(function)
    if any(new.name == other.name for other in known()):
        raise RuleAlreadyRegistered(
            f"{new.name} is traced on half operands already. To keep one call in "
            "float32, write jaxmp.full_precision(function)(...) there."
        )
    _registered[new.name] = new


def _read(function: Any) -> Function:
    if isinstance(function, str):
        if "." not in function:
            raise AutocastRuleError(
                f"{function!r} is not a dotted name of a function. Write "
                "register_rule('package.module.function', 'half_operands')."
            )
        return Function(function)
    if not callable(function):
        raise AutocastRuleError(
            f"{function!r} is not a function, so it cannot be traced on half operands. "
            "Write register_rule(function, 'half_operands')."
        )
    if inspect.ismethod(function):
        kind = type(function.__self__).__name__
        raise AutocastRuleError(
            f"{function.__qualname__} is bound to one {kind}. Register the function of "
            f"the class: register_rule({kind}.{function.__name__}, 'half_operands')."
        )
    module = getattr(function, "__module__", None)
    name = f"{module}.{getattr(function, '__qualname__', None)}"
    place = find(Function(name))
    if place is not None and _is(place.value, function):
        return Function(name)
    return Function(f"{name} at {id(function):#x}", value=function)


def _is(held: Any, function: Any) -> bool:
    return held is function or getattr(held, "__func__", None) is function


def find(function: Function) -> Place | None:
    """Looks a function up by its name; None if its module has not been imported."""
    if function.value is not None:
        return Place(None, "", function.value)
    parts = function.name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner: Any = sys.modules.get(".".join(parts[:end]))
        if owner is not None:
            break
    else:
        return None
    for part in parts[end:-1]:
        owner = vars(owner).get(part)
        if not inspect.isclass(owner):
            return None
    name = parts[-1]
    bases = owner.__mro__ if inspect.isclass(owner) else (owner,)
    for base in bases:
        if name in vars(base):
            return Place(base, name, vars(base)[name])
    return None
