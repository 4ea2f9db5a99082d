"""Functions that are traced on half operands, as fused attention has to be.

A fused kernel is written for the dtypes of its operands. No plan can change them once
it is traced, so they are narrowed before: where autocast traces a call of such a
function, the call gets its float32 arrays in the compute dtype. What is inside stays as
it was traced, forward and backward, and its half results are shown in float32 to the
code around, which was written for that. The plan reads them in half.
"""

import contextlib
import functools
import re
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from jaxmp import _tree
from jaxmp._jaxpr.marks import HALF_SCOPE, scopes
from jaxmp.casting.kernels.border import shown
from jaxmp.casting.ops import _half_functions, _user_rules
from jaxmp.casting.plan.plan import Settings
from jaxmp.casting.plan.states import FLOAT32


class _Tracing(NamedTuple):
    """What is being traced now, to be planned; `version` is of the known functions."""

    dtype: np.dtype
    rules: tuple[_user_rules.OpRule, ...]
    version: int


# What is traced here was written where the function is called.
source_info_util.register_exclusion(__file__)

# `jax.jit` inside the function must not reuse what it traced without autocast.
_now: Any = jax.make_user_context(None)


def traced_for(settings: Settings) -> Any:
    """A context in which operands are narrowed, as the settings of a plan have it."""
    dtype, rules = settings.compute_dtype, settings.rules
    return _now(_Tracing(dtype, rules, _half_functions.version()))


def as_written() -> Any:
    """A context in which no operand is narrowed."""
    return _now(None)


def half_operands(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function take its float32 arrays in half, wherever autocast traces it.

    It is for fused kernels, such as attention in Pallas, that autocast cannot look
    into: what is inside stays as the function computes it on half operands, a softmax
    too. Functions that modules hold by name can be registered instead, with
    `register_rule(function, "half_operands")`.

    Args:
      fn: takes arrays, or tuples, lists and dicts of arrays.

    Returns:
      A function like `fn`. Under `autocast`, and in the code of layers under
      `apply_policy`, its float32 arrays arrive in the compute dtype, and what it
      returns in half is read as any half value. Scalars, integers and half arrays
      arrive as they are. Elsewhere, inside `full_precision`, and where a rule with
      `path=` or `function=` asks for float32, it is `fn`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp
      >>> kernel = lambda q, k: (q @ k.T, print(q.dtype))[0]  # stands for a fused one
      >>> attend = jaxmp.half_operands(kernel)
      >>> x = jnp.ones((2, 4))
      >>> jaxmp.autocast(lambda x: attend(x, x))(x).dtype
      bfloat16
      dtype('float32')
      >>> _ = attend(x, x)
      float32
    """
    return on_half(fn, None)


def on_half(
    fn: Callable[..., Any],
    operands: Sequence[str] | None,
    dtypes: Collection[np.dtype] = _tree.HALF,
    first: int = 0,
) -> Callable[..., Any]:
    """The function with its operands narrowed.

    Args:
      fn: the function.
      operands: names of the parameters to narrow, the first ones of `fn`; None: all.
      dtypes: the half dtypes that it takes.
      first: how many positional arguments come before, such as `self`.
    """

    @functools.wraps(fn, updated=())
    def with_half_operands(*args: Any, **kwargs: Any) -> Any:
        dtype = _dtype_here()
        if dtype is None or dtype not in dtypes:
            return fn(*args, **kwargs)
        narrow = _Narrowing(dtype, operands)
        operands_given = enumerate(args[first:])
        new_args = [*args[:first], *(narrow.at(i, x) for i, x in operands_given)]
        new_kwargs = {name: narrow.named(name, x) for name, x in kwargs.items()}
        if not narrow.has_narrowed:
            return fn(*args, **kwargs)
        with as_written(), jax.named_scope(HALF_SCOPE):
            output = fn(*new_args, **new_kwargs)
        return shown(output, FLOAT32)

    for name in filter(functools.partial(hasattr, fn), _OF_JITTED_FUNCTIONS):
        setattr(with_half_operands, name, getattr(fn, name))
    return with_half_operands


_OF_JITTED_FUNCTIONS = ("lower", "trace", "eval_shape", "clear_cache")


def _dtype_here() -> np.dtype | None:
    """The half dtype to narrow to in a call that is traced here; None for no dtype."""
    now = _now.value
    if now is None:
        return None
    dtype = now.dtype
    if now.rules:
        place = types.SimpleNamespace(source_info=source_info_util.current())
        around = scopes(place)
        for rule in now.rules:
            is_general = rule.primitive is None and rule.compute is not None
            if is_general and _user_rules.matches(rule, "", around, place):
                dtype = rule.compute
                break
    return dtype if dtype in _tree.HALF else None


class _Narrowing:
    """Casts the operands of one call, and remembers whether there was one to cast."""

    def __init__(self, dtype: np.dtype, operands: Sequence[str] | None):
        self.dtype = dtype
        self.operands = operands
        self.has_narrowed = False

    def at(self, index: int, x: Any) -> Any:
        if self.operands is None:
            return self.cast(x)
        in_range = index < len(self.operands)
        return self.named(self.operands[index], x) if in_range else x

    def named(self, name: str, x: Any) -> Any:
        if self.operands is None:
            return self.cast(x)
        return self.cast(x, name == "bias") if name in self.operands else x

    def cast(self, x: Any, is_bias: bool = False) -> Any:
        if type(x) in (tuple, list):
            items = [self.cast(item) for item in x]
            is_same = all(new is old for new, old in zip(items, x, strict=True))
            return x if is_same else type(x)(items)
        if type(x) is dict:
            new = {name: self.cast(item) for name, item in x.items()}
            return x if all(new[name] is x[name] for name in x) else new
        if not _is_float32_array(x):
            return x
        self.has_narrowed = True
        if is_bias:
            # A mask of -1e38 would become -inf, and -inf minus -inf is NaN.
            limits = jnp.finfo(self.dtype)
            x = jnp.clip(x, float(limits.min), float(limits.max))
        return jnp.asarray(x).astype(self.dtype)


def _is_float32_array(x: Any) -> bool:
    if not isinstance(x, (jax.Array, np.ndarray)) or x.ndim == 0:
        return False
    return _tree.is_inexact(x) and jnp.result_type(x) == FLOAT32


@contextlib.contextmanager
def noting_float32() -> Iterator[None]:
    """Adds what to do to the error of a kernel that was called in float32."""
    try:
        yield
    except NotImplementedError as error:
        is_ours = _HALF_ONLY.search(str(error)) is not None
        if is_ours and _HINT not in getattr(error, "__notes__", ()):
            error.add_note(_HINT)
        raise


_HALF_ONLY = re.compile(r"must be fp16/bf16|Only f16 and bf16 are supported")
_HINT = (
    "jaxmp: this attention kernel takes float16 or bfloat16, and was called on float32 "
    "arrays. Under autocast(fn, 'mixed_bfloat16') it gets bfloat16, unless "
    "full_precision, a rule with compute='float32' or the policy 'float32' keeps the "
    "call in float32. Take that away from the call, or let it compute in float32: "
    "jax.nn.dot_product_attention(..., implementation='xla')."
)
