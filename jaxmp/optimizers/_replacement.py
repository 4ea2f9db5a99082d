"""`Replacement`: an update that is the new value itself.

No float32 number is sure to lead from one float32 number to another by an addition: to
move a scale from 1 onto 0.001 takes digits that a number near -0.999 does not have. So
the update says what the sum is. `optax.apply_updates` adds it to the parameter, and the
parameter's own `+` leaves an operand that it does not know to that operand.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import TransformationOrder


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Replacement:
    """Stands in a tree of updates; `p + replacement` is the new value of `p`.

    Attributes:
      value: the new value.
      replaces: boolean scalar; where it is False, `p` stays as it is. Zeros in place of
        both, which is how a skipped update is made, change no bit of `p`.
    """

    value: Any
    replaces: Any

    __array_ufunc__ = None  # NumPy would else add it to each element

    def __radd__(self, p: Any) -> Any:
        if jnp.result_type(self.replaces) != jnp.bool_:
            raise TransformationOrder(
                "The new value of FP8 metadata was scaled or clipped like an update. "
                "Put whatever changes updates inside: overwrite_with_gradient("
                "optax.chain(optax.adam(1e-3), optax.scale(0.5)))."
            )
        p = jnp.asarray(p)
        return jnp.where(self.replaces, self.value.astype(p.dtype), p)

    __add__ = __radd__


def is_replacement(x: Any) -> bool:
    """Whether this stands for the update of a leaf that is overwritten."""
    return isinstance(x, Replacement)
