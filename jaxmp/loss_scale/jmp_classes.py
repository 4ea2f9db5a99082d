"""The three loss scales of jmp, with jmp's fields and methods.

They are for code that unscales and selects by hand; `loss_scaling` does without them.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jmp
import numpy as np

from jaxmp import _tree, _warnings
from jaxmp.errors import SelectPredicateError
from jaxmp.loss_scale.state_machines import Scale, next_scale
from jaxmp.loss_scale.unscale import scale_tree, unscale_tree

T = TypeVar("T")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoOpLossScale:
    """A loss scale of 1 that changes nothing.

    Example:
      >>> import jaxmp
      >>> jaxmp.NoOpLossScale().scale({"loss": 2.0})
      {'loss': 2.0}
    """

    @property
    def loss_scale(self) -> int:
        """The scale, 1."""
        return 1

    def scale(self, tree: T) -> T:
        """Returns the tree itself."""
        return tree

    def unscale(self, tree: T) -> T:
        """Returns the tree itself."""
        return tree

    def adjust(self, grads_finite: jax.Array) -> "NoOpLossScale":
        """Returns itself."""
        del grads_finite
        return self


class _Scales:
    """The methods of every loss scale that has a number."""

    loss_scale: Any

    def scale(self, tree: T) -> T:
        """Multiplies the floating leaves by the scale, in float32 at least."""
        return scale_tree(tree, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """Divides the floating leaves by the scale, in float32 at least."""
        return unscale_tree(tree, self.loss_scale)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticLossScale(_Scales):
    """A fixed loss scale. It is static data: a Python number.

    Args:
      loss_scale: any positive number.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> float(jaxmp.StaticLossScale(8).unscale(jnp.float16(4.0)))
      0.5
    """

    loss_scale: Any

    def __post_init__(self) -> None:
        if _tree.is_array(self.loss_scale):
            object.__setattr__(self, "loss_scale", self.loss_scale.item())

    def adjust(self, grads_finite: jax.Array) -> "StaticLossScale":
        """Returns itself."""
        del grads_finite
        return self


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class DynamicLossScale(_Scales):
    """A loss scale that grows after `period` finite steps and shrinks on others.

    Scale and counter are the leaves of this pytree. The rest is static and survives
    every `tree_map`, `jit` and checkpoint.

    Args:
      loss_scale: first scale, a float32 scalar array or a number. jmp advises 2**15.
      counter: int32 scalar array, finite steps in a row.
      period: the scale grows on the `period`-th finite step in a row.
      factor: number by which the scale is multiplied or divided.
      min_loss_scale: lowest scale, a number; may be below 1.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> loss_scale = jaxmp.DynamicLossScale(2.0**15, period=1)
      >>> float(loss_scale.adjust(jnp.bool_(True)).loss_scale)
      65536.0
    """

    loss_scale: Any
    counter: Any = dataclasses.field(default_factory=lambda: np.zeros((), np.int32))
    period: int = 2000
    factor: float = 2
    min_loss_scale: float = 1.0

    def __post_init__(self) -> None:
        scale, smallest = self.loss_scale, self.min_loss_scale
        _warn_unless_floating(scale, "loss_scale")
        _warn_unless_floating(smallest, "min_loss_scale")
        # A Python float would be weakly typed, and the step would compile again after
        # the first one; a float16 scale could not hold 2**16.
        if isinstance(scale, (int, float, *_tree.NUMPY)):
            object.__setattr__(self, "loss_scale", np.asarray(scale, np.float32))
        elif isinstance(scale, jax.Array):
            object.__setattr__(self, "loss_scale", jnp.asarray(scale, jnp.float32))
        object.__setattr__(self, "min_loss_scale", float(smallest))

    def adjust(self, grads_finite: jax.Array) -> "DynamicLossScale":
        """Moves the scale by one step.

        Args:
          grads_finite: boolean scalar array.

        Returns:
          The next loss scale, a pytree of the same dtypes.

        Raises:
          SelectPredicateError: if `grads_finite` is not a scalar.
        """
        if jnp.ndim(grads_finite) != 0:
            raise SelectPredicateError(
                "adjust() needs one boolean for the whole step, expected boolean "
                f"scalar, not shape {jnp.shape(grads_finite)}. Use all_finite(grads)."
            )
        scale, counter, _ = next_scale(
            Scale(
                jnp.asarray(self.loss_scale, jnp.float32),
                jnp.asarray(self.counter, jnp.int32),
                jnp.int32(1),
            ),
            grads_finite,
            growth_interval=self.period,
            growth_factor=self.factor,
            backoff_factor=1 / self.factor,
            min_scale=self.min_loss_scale,
            max_scale=float("inf"),
            hysteresis=1,
        )
        return dataclasses.replace(self, loss_scale=scale, counter=counter)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Returns scale and counter as children, the rest as static data."""
        static = (self.period, self.factor, self.min_loss_scale)
        return (self.loss_scale, self.counter), static

    @classmethod
    def tree_unflatten(
        cls, static: tuple[Any, ...], children: tuple[Any, ...]
    ) -> "DynamicLossScale":
        """Takes anything that JAX puts in place of the arrays, without checks."""
        new = object.__new__(cls)
        fields = [field.name for field in dataclasses.fields(cls)]
        for name, value in zip(fields, (*children, *static), strict=True):
            object.__setattr__(new, name, value)
        return new


LossScale = NoOpLossScale | StaticLossScale | DynamicLossScale
"""Any of the three, for annotations and `isinstance`."""


def of_jmp(x: Any) -> Any:
    """Turns a loss scale of the library jmp into jaxmp's; anything else passes."""
    match x:
        case jmp.NoOpLossScale():
            return NoOpLossScale()
        case jmp.StaticLossScale():
            return StaticLossScale(x.loss_scale)
        case jmp.DynamicLossScale():
            return DynamicLossScale(
                x.loss_scale, x.counter, x.period, x.factor, _number(x.min_loss_scale)
            )
    return x


def _number(x: Any) -> Any:
    return x.item() if _tree.is_array(x) else x


def select_tree(pred: jax.Array, a: T, b: T) -> T:
    """Selects one of two trees by a boolean scalar.

    Args:
      pred: boolean scalar array.
      a: the tree to take if `pred` is True.
      b: the tree to take otherwise, of the same structure and dtypes.

    Returns:
      A tree of the same structure. Nothing of the other tree leaks into it, not even a
      NaN.

    Raises:
      SelectPredicateError: if `pred` is not a boolean scalar.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> float(jaxmp.select_tree(jnp.bool_(False), jnp.float32(jnp.nan), jnp.ones(())))
      1.0
    """
    if jnp.ndim(pred) != 0 or jnp.result_type(pred) != jnp.bool_:
        raise SelectPredicateError(
            f"select_tree() expected boolean scalar, not {jnp.result_type(pred)} of "
            f"shape {jnp.shape(pred)}. Reduce it first, for example by all_finite()."
        )
    return _tree.select(pred, a, b)


def _warn_unless_floating(x: Any, name: str) -> None:
    if not (isinstance(x, (int, float)) or _tree.is_array(x)):
        return
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        message = f"Expected floating type for {name}, got {jnp.result_type(x)}"
        _warnings.warn(message)
