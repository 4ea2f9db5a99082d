"""`PolicyRule`: other dtypes for some layers, as frozen data.

Rules are tried in order and the first that matches decides. What a rule leaves out is
inherited from the enclosing layer, so that a rule on a block holds for all inside it.
A matched layer returns the compute dtype of the layer around it, unless the rule names
its output: a float32 norm in a bfloat16 network does not widen what comes after it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InvalidRule
from jaxmp.policy._dtypes import name_to_dtype, read_dtype

KINDS = ("norm", "attention", "embed", "recurrent", "conv", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRule:
    """Which layers it is about, and their dtypes.

    A layer has to match all of `path`, `module_type`, `kind` and `where` that are
    given. `None` matches every layer there, and inherits every dtype below.

    Args:
      path: regular expression for the whole path, such as `r"block_\\d+/attention/.*"`.
        Items of a list are joined to its name: `blocks[0].query` of an nnx module
        reads `"blocks_0/query"`, as linen names it.
      module_type: a class, the name of one, or a tuple of these; subclasses match too.
      kind: `"norm"`, `"attention"`, `"embed"`, `"recurrent"`, `"conv"` or `"dense"`.
      where: a function `(path, module) -> bool`.
      params: dtype in which the layer's parameters are stored.
      compute: dtype in which it computes.
      output: dtype of what it returns.
      allow_unused: False makes it an error if no layer matches.
      yields_to_author: True leaves a layer alone whose author set `dtype=`.

    Raises:
      InvalidRule: for a regular expression that does not compile, an unknown kind or
        dtype, or a rule without any condition.

    Example:
      >>> import jaxmp
      >>> rule = jaxmp.PolicyRule(path="decoder/head", compute="float32")
      >>> rule.matches("decoder/head"), rule.matches("decoder/head/bias")
      (True, False)
    """

    path: str | None = None
    module_type: Any = None
    kind: str | None = None
    where: Callable[[str, Any], bool] | None = None
    params: Any = None
    compute: Any = None
    output: Any = None
    allow_unused: bool = False
    yields_to_author: bool = False

    def __post_init__(self):
        conditions = (self.path, self.module_type, self.kind, self.where)
        if all(condition is None for condition in conditions):
            raise InvalidRule(
                f"{self} says of no layer that it is meant. Give path=, module_type=, "
                'kind= or where=; path=".*" means every layer.'
            )
        if self.path is not None:
            _compile(self.path)
        if self.kind is not None and self.kind not in KINDS:
            raise InvalidRule(
                f"Unknown kind {self.kind!r} in a rule. Kinds: {', '.join(KINDS)}."
            )
        if self.module_type is not None and not isinstance(self.module_type, tuple):
            object.__setattr__(self, "module_type", (self.module_type,))
        for field in ("params", "compute", "output"):
            given = getattr(self, field)
            dtype = read_dtype(given)
            if given is not None and dtype is None:
                raise InvalidRule(
                    f"Unknown dtype {given!r} as {field}= of a rule. "
                    f"Write one of: half, {', '.join(name_to_dtype)}."
                )
            object.__setattr__(self, field, dtype)

    def matches(self, path: str, module: Any = None, kind: str | None = None) -> bool:
        """Tells whether a layer is meant.

        Args:
          path: the layer's path, such as `"block_0/attention/query"`.
          module: the layer, or None where only its path is known.
          kind: its kind, or None if it has none.

        Returns:
          A boolean.

        Example:
          >>> import jaxmp
          >>> jaxmp.PolicyRule(kind="norm").matches("block_0/ln", kind="norm")
          True
        """
        if self.path is not None and _compile(self.path).fullmatch(path) is None:
            return False
        if self.module_type is not None and not _is_one_of(module, self.module_type):
            return False
        if self.kind is not None and kind != self.kind:
            return False
        return self.where is None or (module is not None and self.where(path, module))

    def __str__(self) -> str:
        given = [
            f"{field.name}={_written(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
            and field.name not in ("allow_unused", "yields_to_author")
        ]
        return f"PolicyRule({', '.join(given)})"


def first_match(
    rules: Iterable[PolicyRule], path: str, module: Any, kind: str | None
) -> PolicyRule | None:
    """Returns the first rule that is about a layer."""
    return next((rule for rule in rules if rule.matches(path, module, kind)), None)


def check_rules(rules: Any) -> tuple[PolicyRule, ...]:
    """Reads `rules=`: a sequence of rules, or one of them.

    The default rules come after the user's unless they are among them. Norms in half
    are asked for by a rule of their own, or by no rules at all.
    """
    rules = (rules,) if isinstance(rules, PolicyRule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, PolicyRule):
            raise InvalidRule(
                f"rules= takes a sequence of PolicyRule, and {rule!r} is a "
                f"{type(rule).__name__}. For example: rules=(PolicyRule(path='head', "
                "compute='float32'),)."
            )
    has_defaults = any(rule in default_rules for rule in rules)
    return rules if has_defaults or not rules else (*rules, *default_rules)


norms_in_float32: tuple[PolicyRule, ...] = (
    PolicyRule(
        kind="norm",
        params="float32",
        compute="float32",
        allow_unused=True,
        yields_to_author=True,
    ),
)
"""Normalisation layers keep float32 parameters, statistics and arithmetic."""

default_rules: tuple[PolicyRule, ...] = norms_in_float32
"""What `apply_policy` does if not told otherwise."""

everything_in_half: tuple[PolicyRule, ...] = ()
"""No layer is spared, not even norms: Apex's O3."""


def head_in_float32(path: str) -> tuple[PolicyRule, ...]:
    """Keeps the output layer's matmul and its logits in float32.

    The loss takes half-precision logits up to float32 by itself, so few models need
    this, and for a large vocabulary it costs memory.

    Args:
      path: regular expression for the path of the output layer.

    Returns:
      A tuple with one rule, to be put before `default_rules`.

    Raises:
      InvalidRule: if the expression does not compile.

    Example:
      >>> import jaxmp
      >>> rules = (*jaxmp.head_in_float32("lm_head"), *jaxmp.default_rules)
    """
    return (
        PolicyRule(path=path, params="float32", compute="float32", output="float32"),
    )


def matmuls_in_half(dtype: Any) -> tuple[PolicyRule, ...]:
    """Dense, convolution, recurrent and attention layers in half, the rest in float32.

    The most careful level short of float32, with the activations between layers in
    float32: Apex's O1, layer by layer. `autocast` does the same operation by operation.

    Args:
      dtype: `"bfloat16"` or `"float16"`.

    Returns:
      A tuple of rules for a float32 policy.

    Raises:
      InvalidRule: if it is no dtype.

    Example:
      >>> import jaxmp
      >>> [rule.kind for rule in jaxmp.policy.matmuls_in_half("bfloat16")]
      ['dense', 'conv', 'recurrent', 'attention']
    """
    kinds: Sequence[str] = ("dense", "conv", "recurrent", "attention")
    return tuple(
        PolicyRule(kind=kind, compute=dtype, allow_unused=True, yields_to_author=True)
        for kind in kinds
    )


def _compile(path: str) -> re.Pattern[str]:
    try:
        return re.compile(path)
    except re.error as error:
        at = error.pos or 0
        raise InvalidRule(
            f"The path of a rule is no regular expression ({error.msg}):\n"
            f"    {path}\n    {' ' * at}^\n"
            f"To match it letter by letter, write re.escape({path!r})."
        ) from None


def _is_one_of(module: Any, types: tuple[Any, ...]) -> bool:
    if module is None:
        return False
    return any(
        base is wanted or base.__name__ == wanted
        for base in type(module).__mro__
        for wanted in types
    )


def _written(value: Any) -> str:
    if isinstance(value, np.dtype) or value in (jnp.bfloat16,):
        return str(value)
    if isinstance(value, tuple):
        names = [getattr(item, "__name__", str(item)) for item in value]
        return " | ".join(names)
    return getattr(value, "__name__", None) or repr(value)
