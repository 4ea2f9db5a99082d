"""Ready-made rules, and how `rules=` is read and searched."""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from jaxmp.errors import InvalidRule
from jaxmp.policy._rules import PolicyRule
from jaxmp.policy.blocks import FirstAndLast, warn_of_no_blocks
from jaxmp.policy.quantize import NOT_QUANTIZED

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
"""The default of `apply_policy`; `rules=()` spares no layer, as Apex's O3."""


def head_in_float32(path: str) -> tuple[PolicyRule, ...]:
    """Keeps the output layer's matmul and its logits in float32.

    Most losses widen half-precision logits to float32 themselves, so few models need
    this, and for a large vocabulary it costs memory.

    Args:
      path: regular expression for the path of the output layer.

    Returns:
      A tuple with one rule, to put before `default_rules`.

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
    """Runs layers with matmuls in half precision and all others in float32.

    Dense, convolution, recurrent and attention layers run in half. This is the most
    careful level short of float32: activations between layers stay float32, as in
    Apex's O1. `autocast` does the same operation by operation.

    Args:
      dtype: `"bfloat16"` or `"float16"`.

    Returns:
      A tuple of rules for a float32 policy.

    Raises:
      InvalidRule: if it is not a dtype.

    Example:
      >>> import jaxmp
      >>> [rule.kind for rule in jaxmp.policy.matmuls_in_half("bfloat16")]
      ['dense', 'conv', 'recurrent', 'attention']
    """
    return tuple(
        PolicyRule(kind=kind, compute=dtype, allow_unused=True, yields_to_author=True)
        for kind in ("dense", "conv", "recurrent", "attention")
    )


def first_and_last_in_half(blocks: int = 1) -> tuple[PolicyRule, ...]:
    """Leaves the matmuls of the first and the last blocks of layers in half.

    For a policy that multiplies in float8 or int8. The blocks at both ends are those
    whose rounding costs most (Noune et al., "8-bit Numerical Formats for Deep Neural
    Networks", 2022, https://arxiv.org/abs/2206.02915, keep them in half too). Blocks
    have one name and a number each, as `block_0` to `block_11` or `layers/0` to
    `layers/5`.

    Args:
      blocks: how many of the first, and of the last.

    Returns:
      A tuple with one rule, for `apply_policy` and for `autocast`, which warn if no
      blocks are found.

    Raises:
      InvalidRule: if it is not a positive number.

    Example:
      >>> import jaxmp
      >>> rules = jaxmp.policy.first_and_last_in_half(blocks=1)
      >>> step = jaxmp.autocast(lambda x: x @ x, "mixed_fp8", rules=rules)
    """
    if not isinstance(blocks, int) or blocks < 1:
        raise InvalidRule(
            f"first_and_last_in_half(blocks={blocks!r}) leaves nothing in half. Write "
            "a number from 1 on, or leave the rule out."
        )
    condition = FirstAndLast(blocks)
    return (PolicyRule(where=condition, quantize=NOT_QUANTIZED, allow_unused=True),)


def half_blocks_in(rules: Iterable[Any]) -> int:
    """How many first and last blocks rules leave in half, whose paths are not known."""
    conditions = (getattr(rule, "where", None) for rule in rules)
    found = (x for x in conditions if isinstance(x, FirstAndLast) and x.paths is None)
    return max((x.blocks for x in found), default=0)


def with_blocks(
    rules: Iterable[PolicyRule], paths: Collection[str]
) -> tuple[PolicyRule, ...]:
    """The rules for a model whose layers with matmuls have these paths.

    Warns:
      NoBlocksWarning: if a rule is for blocks, and there are none.
    """

    def read(rule: PolicyRule) -> PolicyRule:
        if not isinstance(rule.where, FirstAndLast):
            return rule
        found = rule.where.among(paths)
        if not found.paths:
            warn_of_no_blocks(paths)
        return dataclasses.replace(rule, where=found)

    return tuple(map(read, rules))


def first_match(
    rules: Iterable[PolicyRule], path: str, module: Any, kind: str | None
) -> PolicyRule | None:
    """Returns the first rule that decides in which dtypes a layer computes, or None."""
    matching = (rule for rule in rules if rule.matches(path, module, kind))
    return next((rule for rule in matching if rule.decides_dtypes), None)


def first_reduction(
    rules: Iterable[PolicyRule], path: str, module: Any, kind: str | None
) -> PolicyRule | None:
    """Returns the first rule that decides in which dtype its gradients are summed."""
    matching = (rule for rule in rules if rule.reduce is not None)
    return next((r for r in matching if r.matches(path, module, kind)), None)


def first_quantization(
    rules: Iterable[PolicyRule], path: str, module: Any, kind: str | None
) -> PolicyRule | None:
    """Returns the first rule that decides in which format its matmuls are."""
    deciding = (r for r in rules if r.quantize is not None or r.compute is not None)
    return next((r for r in deciding if r.matches(path, module, kind)), None)


def check_rules(rules: Any) -> tuple[PolicyRule, ...]:
    """Reads `rules=`: a sequence of rules, or a single one.

    The default rules are appended unless the user's contain them. To get norms in half,
    write a rule for them, or pass no rules at all.
    """
    if isinstance(rules, PolicyRule):
        rules = (rules,)
    elif not isinstance(rules, Iterable):
        raise InvalidRule(
            f"rules= takes a sequence of PolicyRule, not {rules!r}. Leave it out for "
            "the default rules, or write rules=() for none."
        )
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, PolicyRule):
            raise InvalidRule(
                f"rules= takes a sequence of PolicyRule, and {rule!r} is a "
                f"{type(rule).__name__}. For example: rules=(PolicyRule(path='head', "
                "compute='float32'),)."
            )
    has_defaults = any(rule in default_rules for rule in rules)
    return rules if has_defaults or not rules else (*rules, *default_rules)
