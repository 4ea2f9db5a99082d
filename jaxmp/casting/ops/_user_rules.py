"""Users' rules: which operations compute in which dtype, by name or place."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmp._jaxpr.types import Eqn
from jaxmp.errors import AutocastRuleError
from jaxmp.policy import get_policy
from jaxmp.policy.quantize import NOT_QUANTIZED, RECIPES, read_quantize
from jaxmp.policy.rule_sets import half_blocks_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpRule:
    """Sets the dtype of the operations that it matches; the first match wins.

    Every condition that is given must hold.

    Args:
      primitive: name, or names, of primitives: `"tanh"`, `("exp", "log")`.
      path: regular expression, matched in full against the name scope of an operation
        or any scope around it: `"decoder/block_3"` is the block and all that is in it.
        Flax modules open a scope each; the root module's name may be left out.
      function: regular expression, matched in full against the names of the Python
        functions that an operation was written in.
      compute: the dtype that the matched operations compute in and return.
      carry: the dtype of what the matched loops (`scan`, `while`) carry for the matmuls
        in them: `"float32"`, such as for the small steps of an integrator, or the
        compute dtype of the policy, for sums too. It decides nothing else in the loop.
      quantize: how the matched matmuls are multiplied, as in `Policy.quantize`, or
        `"none"` to leave them in half. It takes the head and any sizes too; products of
        two activations stay in half. A rule with `compute=` and without `quantize=`
        leaves them in that dtype.
      allow_unused: if False, a rule that matches nothing is an error.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> from jaxmp.casting import OpRule
      >>> f = jaxmp.autocast(lambda x: x @ x, rules=[OpRule(primitive="dot_general",
      ...                                                   compute="float32")])
      >>> float(f(jnp.full((1, 1), 1.001)).item()) == 1.001**2
      False
    """

    primitive: str | tuple[str, ...] | None = None
    path: str | None = None
    function: str | None = None
    compute: Any = None
    carry: Any = None
    quantize: str | None = None
    allow_unused: bool = False

    def __post_init__(self):
        decides = self.compute is not None or self.quantize is not None
        if decides == (self.carry is not None):
            raise AutocastRuleError(
                f"{self} has to set one dtype. Give it compute='float32', or "
                "carry='float32' for what loops carry."
            )
        if self.quantize is not None and read_quantize(self.quantize) is None:
            raise AutocastRuleError(
                f"Unknown quantize={self.quantize!r} in a rule. Write one of: "
                f"{', '.join((*RECIPES, NOT_QUANTIZED))}."
            )
        if (self.primitive, self.path, self.function) == (None, None, None):
            raise AutocastRuleError(
                f"{self} has no condition. Give it primitive=, path= or function=."
            )
        for name in ("compute", "carry"):
            if getattr(self, name) is not None:
                dtype = get_policy(getattr(self, name)).compute_dtype
                object.__setattr__(self, name, np.dtype(dtype))
        if isinstance(self.primitive, (list, set)):
            object.__setattr__(self, "primitive", tuple(self.primitive))


def read_rules(rules: Sequence[Any]) -> tuple[OpRule, ...]:
    """Reads `rules=`: `OpRule`s, and `PolicyRule`s with a path and a compute dtype.

    Args:
      rules: a sequence of either.

    Returns:
      A tuple of `OpRule`s.

    Raises:
      AutocastRuleError: for a rule with a condition that a jaxpr does not show.
    """
    if isinstance(rules, (str, bytes)) or not isinstance(rules, Sequence):
        raise AutocastRuleError(
            f"rules={rules!r} is not a sequence of rules. Write rules=[OpRule(...)]."
        )
    own = (rule for rule in rules if not half_blocks_in([rule]))
    return tuple(map(_read_rule, own))


def _read_rule(rule: Any) -> OpRule:
    if isinstance(rule, OpRule):
        return rule
    if not hasattr(rule, "path") or not hasattr(rule, "compute"):
        raise AutocastRuleError(
            f"{rule!r} is not a rule. Write jaxmp.casting.OpRule(path=..., "
            "compute=...)."
        )
    unseen = ("module_type", "kind", "where", "params", "output", "reduce")
    given = [name for name in unseen if getattr(rule, name, None) is not None]
    quantize = getattr(rule, "quantize", None)
    if given or rule.path is None or (rule.compute is None and quantize is None):
        raise AutocastRuleError(
            f"autocast sees operations, not modules: it can match path= and set "
            f"compute= or quantize=, but not {', '.join(given) or 'nothing at all'}, "
            f"in {rule!r}. Use jaxmp.apply_policy for this rule."
        )
    return OpRule(
        path=rule.path,
        compute=rule.compute,
        quantize=quantize,
        allow_unused=getattr(rule, "allow_unused", False),
    )


def matches(rule: OpRule, primitive: str, scopes: tuple[str, ...], eqn: Eqn) -> bool:
    """Whether a rule matches an operation.

    Args:
      rule: the rule.
      primitive: name of the primitive.
      scopes: the normalised name scopes around it, outermost first.
      eqn: its equation, for the names of the functions it was written in.
    """
    if rule.primitive is not None:
        names = (rule.primitive,) if isinstance(rule.primitive, str) else rule.primitive
        if primitive not in names:
            return False
    if rule.path is not None and not _path_matches(rule.path, scopes):
        return False
    if rule.function is not None:
        traceback = eqn.source_info.traceback
        frames = traceback.frames if traceback is not None else ()
        return any(
            re.fullmatch(rule.function, name)
            for frame in frames
            for name in (frame.function_name, frame.function_name.split(".")[-1])
        )
    return True


@functools.lru_cache(maxsize=4096)
def _path_matches(pattern: str, scopes: tuple[str, ...]) -> bool:
    # The first scope may be the root module's class name, which paths leave out.
    return any(
        re.fullmatch(pattern, "/".join(scopes[start:end]))
        for start in (0, 1)
        for end in range(start + 1, len(scopes) + 1)
    )
