"""`PolicyRule`: other dtypes for some layers, as frozen data.

Rules are tried in order and the first match decides. A dtype that a rule leaves out is
inherited from the enclosing layer, so a rule for a block holds for everything inside.
A matched layer returns the compute dtype of the layer around it unless the rule names
its output: a float32 norm in a bfloat16 network does not widen what follows it.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmp import _tree
from jaxmp.errors import InvalidRule
from jaxmp.policy.dtypes import name_to_dtype, read_dtype
from jaxmp.policy.quantize import (
    NOT_QUANTIZED,
    RECIPES,
    check_compute_dtype,
    read_quantize,
)
from jaxmp.policy.reduce_dtype import read_reduce_dtype

KINDS = ("norm", "attention", "embed", "recurrent", "conv", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRule:
    """Gives some layers of a model dtypes of their own.

    A layer matches if it meets every condition given among `path`, `module_type`,
    `kind` and `where`. A dtype that is None is inherited.

    Args:
      path: regular expression for the whole path, such as `r"block_\\d+/attention/.*"`.
        Items of a list are joined to its name: `blocks[0].query` of an nnx module
        reads `"blocks_0/query"`, as linen names it.
      module_type: a class, the name of one, or a tuple of these; subclasses match too.
      kind: `"norm"`, `"attention"`, `"embed"`, `"recurrent"`, `"conv"` or `"dense"`.
      where: a function `(path, module) -> bool`.
      params: dtype in which the layer's parameters are stored.
      compute: dtype in which the layer computes.
      output: dtype of the layer's results.
      reduce: dtype in which the gradients of the layer's weights leave its matmuls,
        and devices add them up: float32, or the layer's compute dtype. The first rule
        that matches and has one decides; a rule with no other dtype decides nothing
        else.
      quantize: how the layer's matmuls are multiplied, as in `Policy.quantize`;
        `"none"` leaves them in half. A rule that has `compute=` and no `quantize=`
        leaves them in that dtype. The first rule that matches and has either decides.
      allow_unused: True lets the rule match no layer; otherwise this is an error.
      yields_to_author: True leaves layers alone whose author set `dtype=`.

    Raises:
      InvalidRule: for a regular expression that does not compile, an unknown kind or
        dtype, or a rule without conditions.

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
    reduce: Any = None
    quantize: str | None = None
    allow_unused: bool = False
    yields_to_author: bool = False

    def __post_init__(self) -> None:
        conditions = (self.path, self.module_type, self.kind, self.where)
        if all(condition is None for condition in conditions):
            raise InvalidRule(
                f"{self} does not say which layers it is for. Give path=, "
                'module_type=, kind= or where=; path=".*" means every layer.'
            )
        if self.path is not None:
            _compile(self.path)
        if self.kind is not None and self.kind not in KINDS:
            raise InvalidRule(
                f"Unknown kind {self.kind!r} in a rule. Kinds: {', '.join(KINDS)}."
            )
        if self.module_type is not None and not isinstance(self.module_type, tuple):
            object.__setattr__(self, "module_type", (self.module_type,))
        for field in ("params", "compute", "output", "reduce"):
            given = getattr(self, field)
            dtype = read_dtype(given)
            if given is not None and dtype is None:
                raise InvalidRule(
                    f"Unknown dtype {given!r} as {field}= of a rule. "
                    f"Write one of: half, {', '.join(name_to_dtype)}."
                )
            object.__setattr__(self, field, dtype)
        if self.compute is not None:
            check_compute_dtype(self.compute)
        if self.reduce is not None and self.compute is not None:
            read_reduce_dtype(self.reduce, self.compute)
        if self.quantize is not None:
            self._check_quantize()

    def _check_quantize(self) -> None:
        if read_quantize(self.quantize) is None:
            names = ", ".join((*RECIPES, NOT_QUANTIZED))
            raise InvalidRule(
                f"Unknown quantize={self.quantize!r} in a rule. Write one of: {names}."
            )
        if self.compute is not None and self.compute not in _tree.HALF:
            raise InvalidRule(
                f"{self} asks for matmuls in {self.compute} and in {self.quantize}. "
                "Leave one of the two out."
            )

    @property
    def decides_dtypes(self) -> bool:
        """Whether it decides about more than the reduce dtype and `quantize`."""
        dtypes = (self.params, self.compute, self.output)
        has_other = self.reduce is not None or self.quantize is not None
        return not has_other or any(dtype is not None for dtype in dtypes)

    def matches(self, path: str, module: Any = None, kind: str | None = None) -> bool:
        """Returns whether a layer meets the conditions of this rule.

        Args:
          path: the layer's path, such as `"block_0/attention/query"`.
          module: the layer, or None if only its path is known.
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


def _compile(path: str) -> re.Pattern[str]:
    try:
        return re.compile(path)
    except re.error as error:
        at = error.pos or 0
        raise InvalidRule(
            f"The path of a rule is not a regular expression ({error.msg}):\n"
            f"    {path}\n    {' ' * at}^\n"
            f"To match it literally, write re.escape({path!r})."
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
    if isinstance(value, np.dtype):
        return str(value)
    if isinstance(value, tuple):
        return " | ".join(getattr(item, "__name__", str(item)) for item in value)
    return getattr(value, "__name__", None) or repr(value)
