"""The kind of a layer, and its dtypes under a policy and rules."""

import contextlib
import difflib
import enum
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.flax_internals import is_flax_layer
from jaxmp._jaxpr.marks import (
    HALF_GRADIENTS_SCOPE,
    OWN_MATMUL_SCOPE,
    WIDE_GRADIENTS_SCOPE,
    quantize_scope,
)
from jaxmp.errors import UnusedRule
from jaxmp.policy import Policy, PolicyRule
from jaxmp.policy.quantize import NOT_QUANTIZED
from jaxmp.policy.reduce_dtype import read_reduce_dtype
from jaxmp.policy.rule_sets import (
    first_match,
    first_quantization,
    first_reduction,
    norms_in_float32,
)

_KIND_OF_FLAX_CLASS = {
    "Dense": "dense",
    "DenseGeneral": "dense",
    "Einsum": "dense",
    "Linear": "dense",
    "LinearGeneral": "dense",
    "LoRA": "dense",
    "LoRALinear": "dense",
    "Conv": "conv",
    "ConvLocal": "conv",
    "ConvTranspose": "conv",
    "Embed": "embed",
    "MultiHeadDotProductAttention": "attention",
    "MultiHeadAttention": "attention",
    "SelfAttention": "attention",
    "RNNCellBase": "recurrent",
    "RNN": "recurrent",
    "Bidirectional": "recurrent",
    "BatchNorm": "norm",
    "LayerNorm": "norm",
    "RMSNorm": "norm",
    "GroupNorm": "norm",
    "InstanceNorm": "norm",
}

# Norms written by hand have one of these names in every model seen (LLaMA's RMSNorm,
# T5's LayerNorm). A "PreNorm" wraps another layer and is not a norm, nor is a whole
# layer that is named after its norm (Wav2Vec2's EncoderLayerStableLayerNorm).
_NORM_NAME = re.compile(
    r"(?!.*(Encoder|Decoder|Attention|Block|Layer(?!_?Norm)))"
    r".*(Batch|Layer|RMS|Rms|Group|Instance|Scale)_?Norm(alization)?"
)


def original_class(cls: Any) -> Any:
    """Returns the class that the user wrote, given the one that a policy made of it."""
    return getattr(cls, "_original_class", cls)


def is_of_flax(cls: type) -> bool:
    """True for Flax's own layers and their subclasses, under a policy or not."""
    return any(map(is_flax_layer, cls.__mro__))


def declared_dtype(param_dtype: Any) -> np.dtype:
    """The dtype in which an author stores parameters; float32 by default."""
    try:
        return jnp.dtype(_tree.FLOAT32 if param_dtype is None else param_dtype)
    except (TypeError, ValueError):  # it means something else to the user
        return _tree.FLOAT32


def kind_of(module: Any) -> str | None:
    """Returns the kind of a layer, the same for its linen and its nnx form."""
    for cls in type(module).__mro__:
        if is_flax_layer(cls) and cls.__name__ in _KIND_OF_FLAX_CLASS:
            return _KIND_OF_FLAX_CLASS[cls.__name__]
        if not is_flax_layer(cls) and _NORM_NAME.fullmatch(cls.__name__):
            return "norm"
    return None


class Application(NamedTuple):
    """A policy and its options, as applied to one module.

    Attributes:
      policy: the policy.
      rules: the rules, in order.
      named_scopes: whether layers are named in HLO dumps and profiles.
      explicit_dtype: "override" or "keep" a layer's own dtype; None keeps those that
        were not handed down.
      own_code: "autocast" plans the code of the user's layers, "half" casts their
        inputs, parameters and outputs.
    """

    policy: Policy
    rules: tuple[PolicyRule, ...]
    named_scopes: bool = True
    explicit_dtype: str | None = None
    own_code: str = "autocast"

    @property
    def has_wide_gradients(self) -> bool:
        """Whether some weights get their gradients in float32."""
        dtypes = (self.policy.reduce_dtype, *(rule.reduce for rule in self.rules))
        return _tree.FLOAT32 in dtypes

    @property
    def half_dtype(self) -> np.dtype:
        """The half dtype that the policy or a rule computes in; float32 for none."""
        dtypes = (self.policy.compute_dtype, *(rule.compute for rule in self.rules))
        halves = (dtype for dtype in dtypes if dtype in _tree.HALF)
        return next(halves, _tree.FLOAT32)

    @property
    def quantizes(self) -> bool:
        """Whether some matmuls are multiplied in a smaller format."""
        names = (self.policy.quantize, *(rule.quantize for rule in self.rules))
        return any(name not in (None, NOT_QUANTIZED) for name in names)

    @property
    def needs_plan(self) -> bool:
        """Whether layers of Flax are planned too, outside a region as well."""
        return self.has_wide_gradients or self.quantizes

    def matmul_scope(self, module: Any, dtypes: "LayerDtypes") -> str | None:
        """The mark of a layer that has a matmul or a recipe of its own."""
        if not self.quantizes:
            return None
        if has_own_matmul(module):
            return OWN_MATMUL_SCOPE
        is_own = dtypes.quantize_rule is not None
        is_own = is_own or dtypes.quantize != self.policy.quantize
        return quantize_scope(dtypes.quantize or NOT_QUANTIZED) if is_own else None

    def gradients_scope(self, dtypes: "LayerDtypes") -> str | None:
        """The mark of a layer, where rules give layers different reduce dtypes."""
        if all(rule.reduce is None for rule in self.rules):
            return None
        is_wide = dtypes.reduce == _tree.FLOAT32
        return WIDE_GRADIENTS_SCOPE if is_wide else HALF_GRADIENTS_SCOPE


_MATMUL_FIELDS = ("dot_general", "dot_general_cls", "einsum_op")
_PLAIN_MATMULS = (None, jax.lax.dot_general, jnp.einsum)


def has_own_matmul(module: Any) -> bool:
    """Whether the author of a model gave one of Flax's layers a matmul of its own."""
    if not is_of_flax(original_class(type(module))):
        return False
    given = (getattr(module, name, None) for name in _MATMUL_FIELDS)
    return any(all(x is not plain for plain in _PLAIN_MATMULS) for x in given)


def application_of(module: Any) -> Application | None:
    """What was applied to a module by `apply_policy`; None if nothing was."""
    return getattr(type(module), "_application", None)


def scope_of(module: Any, dtype: Any) -> str | None:
    """The name scope of a layer that computes in a dtype; None without a kind."""
    kind = kind_of(module)
    return None if kind is None else f"jaxmp/{kind}/{jnp.dtype(dtype)}"


def named(scope: str | None) -> Any:
    """Enters a name scope, if there is one."""
    return contextlib.nullcontext() if scope is None else jax.named_scope(scope)


class Origin(enum.Enum):
    """Who decided the dtype of a layer."""

    POLICY = "policy"
    RULE = "rule"
    HANDED_DOWN = "handed down"
    AUTHOR = "author's dtype"


def origin_of(
    author: Any,
    expected: np.dtype,
    dtypes: "LayerDtypes",
    explicit_dtype: str | None,
    was_handed: bool = False,
) -> Origin:
    """Returns who decides the dtype of a layer of Flax.

    Args:
      author: the layer's own `dtype`.
      expected: the `dtype` that the policy would give it.
      dtypes: the layer's dtypes under policy and rules.
      explicit_dtype: as in `Application`.
      was_handed: whether the layer's own `dtype` was handed down.
    """
    if dtypes.rule is not None and not dtypes.rule.yields_to_author:
        return Origin.RULE
    if author is not None and explicit_dtype != "override":
        is_given = was_handed or jnp.dtype(author) == expected
        return Origin.HANDED_DOWN if is_given else Origin.AUTHOR
    return Origin.POLICY if dtypes.rule is None else Origin.RULE


class LayerDtypes(NamedTuple):
    """What a layer stores, computes in and returns, and the rule that decided."""

    params: np.dtype
    compute: np.dtype
    output: np.dtype
    rule: PolicyRule | None
    precision: Any = None
    """`precision=` of the layer's matmuls; None leaves it alone."""
    outside: Any = None
    """For a layer named like a norm: the dtypes around it, for the layers inside."""
    reduce: np.dtype | None = None
    """The dtype in which gradients of weights are summed; None is the compute dtype."""
    reduce_rule: PolicyRule | None = None
    """The rule that decided about that."""
    quantize: str | None = None
    """How matmuls are multiplied, as in `PolicyRule.quantize`; None is in half."""
    quantize_rule: PolicyRule | None = None
    """The rule that decided about that."""

    @property
    def rules(self) -> tuple[PolicyRule, ...]:
        """The rules that decided something."""
        rules = (self.rule, self.reduce_rule, self.quantize_rule)
        return tuple(rule for rule in rules if rule is not None)

    @property
    def names_output(self) -> bool:
        """Whether a rule of the user's names what the layer returns."""
        return self.rule is not None and self.rule.output is not None

    def expected(self, module: Any) -> np.dtype:
        """The `dtype` that one of Flax's layers would have if built for the policy."""
        is_norm = kind_of(module) == "norm" and self.compute.itemsize >= 4
        return self.output if is_norm else self.compute


def of_root(policy: Policy, rules: Iterable[PolicyRule], module: Any) -> LayerDtypes:
    """Returns the dtypes of the module that a policy was applied to."""
    rule = first_match(rules, "", module, kind_of(module))
    dtypes = (policy.param_dtype, policy.compute_dtype, policy.output_dtype)
    of_rule = by_rule(rule, *dtypes)._replace(precision=policy.lax_precision)
    reduction = first_reduction(rules, "", module, kind_of(module))
    reduced = _reduced(of_rule, reduction, policy.reduce_dtype)
    return _quantized(reduced, rules, "", module, policy.quantize)


def of_layer(
    enclosing: LayerDtypes, rules: Iterable[PolicyRule], path: str, module: Any
) -> LayerDtypes:
    """Returns the dtypes of a layer inside another one.

    A layer that is called a norm and holds other layers, such as a convolution and its
    norm, is float32 for itself and not for them.
    """
    kind = kind_of(module)
    rule = first_match(rules, path, module, kind)
    is_ready_made_norm = rule in norms_in_float32
    if enclosing.outside is not None and kind != "norm":
        enclosing = enclosing.outside
    dtypes = by_rule(rule, enclosing.params, enclosing.compute, enclosing.compute)
    dtypes = dtypes._replace(
        precision=enclosing.precision,
        outside=enclosing if is_ready_made_norm else None,
    )
    reduction = first_reduction(rules, path, module, kind)
    reduced = _reduced(dtypes, reduction, enclosing.reduce)
    return _quantized(reduced, rules, path, module, enclosing.quantize)


def _reduced(
    dtypes: LayerDtypes, rule: PolicyRule | None, around: np.dtype | None
) -> LayerDtypes:
    """The dtypes with the one in which gradients are summed."""
    if rule is None or dtypes.compute not in _tree.HALF:
        return dtypes._replace(reduce=around, reduce_rule=rule)
    reduce = read_reduce_dtype(rule.reduce, dtypes.compute)
    return dtypes._replace(reduce=reduce, reduce_rule=rule)


def _quantized(
    dtypes: LayerDtypes,
    rules: Iterable[PolicyRule],
    path: str,
    module: Any,
    around: str | None,
) -> LayerDtypes:
    """The dtypes with the recipe of the layer's matmuls."""
    rule = first_quantization(rules, path, module, kind_of(module))
    if rule is None or rule in norms_in_float32:
        return dtypes._replace(quantize=around)
    name = rule.quantize or NOT_QUANTIZED
    deciding = rule if rule.quantize is not None else None
    return dtypes._replace(quantize=name, quantize_rule=deciding)


def by_rule(
    rule: PolicyRule | None, params: np.dtype, compute: np.dtype, output: np.dtype
) -> LayerDtypes:
    """The dtypes that a rule gives, and the given ones where it gives none."""
    if rule is None:
        return LayerDtypes(params, compute, output, None)
    return LayerDtypes(
        params if rule.params is None else rule.params,
        compute if rule.compute is None else rule.compute,
        output if rule.output is None else rule.output,
        rule,
    )


def check_all_used(
    rules: Iterable[PolicyRule], used: Iterable[PolicyRule], paths: Iterable[str]
) -> None:
    """Raises `UnusedRule` for a rule that no layer matched, with the nearest paths."""
    used, paths = list(used), sorted(set(paths) - {""})
    for rule in rules:
        if rule.allow_unused or rule in used:
            continue
        near = difflib.get_close_matches(rule.path or "", paths, n=3, cutoff=0.3)
        known = f"Nearest paths: {', '.join(near)}." if near else _few(paths)
        raise UnusedRule(
            f"{rule} matches no layer. {known} A path has to match in full; "
            "allow_unused=True lets a rule match nothing."
        )


def _few(paths: list[str]) -> str:
    shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
    return f"Paths: {shown}." if paths else "The module has no layers."
