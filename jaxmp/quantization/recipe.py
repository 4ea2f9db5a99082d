"""`Recipe`: in which formats a matmul's operands are multiplied, and their scales."""

from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmp.policy.quantize import RECIPES

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
E5M2 = jnp.dtype(jnp.float8_e5m2)
INT8 = jnp.dtype(jnp.int8)


class Role(NamedTuple):
    """What an operand of a matmul is."""

    name: str
    is_cotangent: bool = False


ACTIVATION = Role("activation")
WEIGHT = Role("weight")
COTANGENT = Role("cotangent", is_cotangent=True)


class Recipe(NamedTuple):
    """How matmuls are quantised: what `Policy.quantize` names.

    Attributes:
      name: as in `Policy.quantize`.
      operand: the format of activations and weights.
      cotangent: the format of cotangents. One operand of a float8 matmul is always
        e4m3: NVIDIA's GPUs multiply no two e5m2 operands ("cuBLAS library", table of
        supported FP8 types).
      per_row: a scale for each row of an operand, over what is added up. Otherwise one
        for the whole array.
      has_half_weight_gradients: whether gradients of weights are multiplied in half.
    """

    name: str
    operand: np.dtype
    cotangent: np.dtype
    per_row: bool = False
    has_half_weight_gradients: bool = False

    def __str__(self) -> str:
        scales = "a scale per row" if self.per_row else "a scale per array"
        text = f"{self.operand.name}, {scales}"
        if self.cotangent != self.operand:
            text += f", cotangents {self.cotangent.name}"
        if self.has_half_weight_gradients:
            text += ", gradients of weights in half"
        return text

    def format_of(self, role: Role) -> np.dtype:
        """The format in which an operand is multiplied."""
        return self.cotangent if role.is_cotangent else self.operand

    def leaves_in_half(self, roles: tuple[Role, Role]) -> bool:
        """Whether a matmul of such operands is left in half: a gradient of a weight."""
        is_gradient = WEIGHT not in roles and COTANGENT in roles
        return self.has_half_weight_gradients and is_gradient


_FIELDS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "fp8": {"operand": E4M3, "cotangent": E4M3},
        "fp8:hybrid": {"operand": E4M3, "cotangent": E5M2},
        "fp8:rowwise": {"operand": E4M3, "cotangent": E4M3, "per_row": True},
        "fp8:rowwise_wgrad_half": {
            "operand": E4M3,
            "cotangent": E4M3,
            "per_row": True,
            "has_half_weight_gradients": True,
        },
        "int8": {"operand": INT8, "cotangent": INT8, "per_row": True},
        "int8:wgrad_half": {
            "operand": INT8,
            "cotangent": INT8,
            "per_row": True,
            "has_half_weight_gradients": True,
        },
    }
)


def recipe_of(name: str) -> Recipe:
    """The recipe that `Policy.quantize` names, such as `"fp8"` or `"int8"`."""
    assert name in RECIPES
    return Recipe(name, **_FIELDS[name])
