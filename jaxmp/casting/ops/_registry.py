"""What autocast knows about primitives: the op lists, and what users added to them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmp.casting.ops import _half_functions
from jaxmp.casting.ops._op_lists import (
    CLASS_OF,
    OPAQUE,
    UNKNOWN,
    Entry,
    OpClass,
)
from jaxmp.errors import AutocastRuleError, RuleAlreadyRegistered

# Costly or not repeatable: never computed again to save memory.
_NOT_REPEATED = frozenset(
    [
        "psum",
        "psum_invariant",
        "reduce_scatter",
        "unreduced_psum",
        "unreduced_reduce_scatter",
        "all_gather",
        "all_gather_invariant",
        "all_to_all",
        "ppermute",
        "pmax",
        "pmin",
        "pbroadcast",
        "sort",
        "top_k",
        "approx_top_k",
        "name",
        "optimization_barrier",
        "random_gamma",
    ]
)
_CHEAP_UNTOUCHED = frozenset(("iota", "convert_element_type"))

ParamsAt = Callable[[dict[str, Any], np.dtype], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Registered:
    """A rule that a user added."""

    entry: Entry
    params_at: ParamsAt | None


_BY_USER = "registered by the user"
_registered: dict[str, Registered] = {}
_call_rules: dict[str, Any] = {}


def register_rule(
    primitive: Any,
    op_class: str,
    *,
    reason: str = _BY_USER,
    params_at: ParamsAt | None = None,
) -> None:
    """Adds a primitive to the op lists, or a function with a kernel inside.

    Args:
      primitive: a `jax.extend.core.Primitive`, or its name. With `"half_operands"`: a
        function, a method as `Class.method`, or the dotted name of either, which need
        not have been imported yet.
      op_class: `"compute"` (half operands and results), `"full"` (float32),
        `"follow"` (as its operands) or `"untouched"`; or `"half_operands"`: wherever a
        name in a module or class leads to the function, calls that autocast traces get
        their float32 arrays in half, see `jaxmp.half_operands`.
      reason: shown by `explain`, for a primitive.
      params_at: `params_at(params, dtype) -> params`, for a primitive with parameters
        that name a dtype, such as `preferred_element_type`. Called when the primitive
        is bound in a half dtype.

    Raises:
      RuleAlreadyRegistered: if the primitive has a class, built in or registered. To
        decide otherwise for one call, use `autocast(..., rules=[OpRule(...)])`. Also if
        the function is known to be traced on half operands.
      AutocastRuleError: for what is not a function, with `"half_operands"`.

    Example:
      >>> import jaxmp
      >>> jaxmp.register_rule("my_library_matmul", "compute")
      >>> jaxmp.register_rule("my_library.kernels.attention", "half_operands")
    """
    if op_class == "half_operands":
        if params_at is not None or reason != _BY_USER:
            raise AutocastRuleError(
                f"params_at= and reason= are for primitives, not for {primitive!r}, "
                "which is to be a function. Write register_rule(function, "
                "'half_operands')."
            )
        _half_functions.register(primitive)
        return
    name = primitive if isinstance(primitive, str) else primitive.name
    if name in _registered or name in CLASS_OF or name in _call_rules:
        raise RuleAlreadyRegistered(
            f"The primitive {name!r} already has the class "
            f"{entry(name).op_class.value!r}. To decide otherwise in one place, write "
            f"autocast(fn, rules=[OpRule(primitive={name!r}, compute=...)])."
        )
    new = Entry(OpClass(op_class), (name,), reason)
    _registered[name] = Registered(new, params_at)


def version() -> int:
    """Changes whenever a rule is registered; part of the key of cached plans."""
    return len(_registered)


def entry(name: str) -> Entry:
    """The class of a primitive, and why."""
    if name in _registered:
        return _registered[name].entry
    return CLASS_OF.get(name, UNKNOWN)


def is_unknown(name: str) -> bool:
    """Whether nothing is known of a primitive, or of what is inside it."""
    is_listed = name in _registered or name in _call_rules or name in CLASS_OF
    return not is_listed or name in OPAQUE


def is_cheap(name: str) -> bool:
    """Whether a primitive may be computed again to save memory."""
    known = entry(name).op_class in (OpClass.FULL, OpClass.FOLLOW)
    return (known and name not in _NOT_REPEATED) or name in _CHEAP_UNTOUCHED


def params_at(
    name: str, params: dict[str, Any], dtype: np.dtype
) -> dict[str, Any] | None:
    """The parameters of a primitive in another dtype; None if they stay the same."""
    if name in _registered:
        rewrite = _registered[name].params_at
        return None if rewrite is None else rewrite(dict(params), dtype)
    if "preferred_element_type" in params:
        return {**params, "preferred_element_type": dtype}
    if name == "convert_element_type":
        return {**params, "new_dtype": dtype}
    return None


def add_call_rule(rule: Any) -> None:
    """Adds the rule for a primitive that holds jaxprs."""
    for name in rule.primitives:
        _call_rules[name] = rule


def call_rule(name: str) -> Any:
    """The rule for a primitive that holds jaxprs, or None."""
    return _call_rules.get(name)
