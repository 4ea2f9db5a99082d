"""Rules that are ready to use, and how `rules=` is read and searched."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxmp.errors import InvalidRule
from jaxmp.policy._rules import PolicyRule

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
"""What `apply_policy` does by default; `rules=()` spares no layer, as Apex's O3."""


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
