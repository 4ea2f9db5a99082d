"""`Policy`: which dtypes parameters, computation and outputs have."""

import dataclasses
from typing import Any, TypeAlias, TypeVar

import jax
import jmp
import numpy as np
from jax.typing import DTypeLike

from jaxmp import _tree
from jaxmp.errors import PolicyError
from jaxmp.policy._matmul_precision import (
    lax_precision,
    precision_names,
    read_precision,
)
from jaxmp.policy.dtypes import dtype_to_names, name_to_dtype, read_dtype
from jaxmp.policy.quantize import check_compute_dtype, check_quantize
from jaxmp.policy.reduce_dtype import read_reduce_dtype

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Policy(jmp.Policy):
    """The dtypes that a computation stores, computes in and returns.

    A policy is a value: frozen, hashable, usable as a static argument. It is a
    `jmp.Policy`, equal to one with the same dtypes, and accepted wherever one is.

    Args:
      param_dtype: dtype in which parameters are stored.
      compute_dtype: dtype in which layers compute.
      output_dtype: dtype of the results. Each of the three may be a dtype, a scalar
        type or a name such as `"bfloat16"` or `"bf16"`.
      matmul_precision: algorithm of the matmuls, which changes no dtype:
        `"tensorfloat32"` (`"tf32"`), or any name or member of `jax.lax.Precision` or
        `jax.lax.DotAlgorithmPreset`. None keeps JAX's default.
      reduce_dtype: dtype in which the gradients of weights leave their matmuls and
        convolutions, and in which devices therefore add them up: the compute dtype, or
        float32. None is the compute dtype, as for a model that is cast by hand.
      quantize: how matmuls with a weight are multiplied in a format smaller than the
        compute dtype: `"fp8"`, `"fp8:hybrid"`, `"fp8:rowwise"`,
        `"fp8:rowwise_wgrad_half"`, `"int8"` or `"int8:wgrad_half"`. None multiplies in
        the compute dtype, which is that of all else in any case.

    Raises:
      PolicyError: for a dtype that is not floating, float8 as the compute dtype, an
        unknown precision, a reduce dtype that cannot hold what the compute dtype holds,
        or `quantize` with a compute dtype that is not half.

    Example:
      >>> import jax.numpy as jnp, jaxmp
      >>> policy = jaxmp.Policy("float32", "bfloat16", "float32")
      >>> policy.cast_to_compute({"x": jnp.ones(3), "step": jnp.int32(1)})["x"].dtype
      dtype(bfloat16)
      >>> str(policy)
      'p=full,c=bf16,o=full'
    """

    param_dtype: Any
    compute_dtype: Any
    output_dtype: Any
    matmul_precision: Any = dataclasses.field(default=None, kw_only=True)
    reduce_dtype: Any = dataclasses.field(default=None, kw_only=True)
    quantize: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for field in ("param_dtype", "compute_dtype", "output_dtype"):
            given = getattr(self, field)
            dtype = read_dtype(given)
            if dtype is None:
                raise PolicyError(
                    f"Unknown dtype {given!r} as {field} of a policy. "
                    f"Write one of: half, {', '.join(name_to_dtype)}."
                )
            object.__setattr__(self, field, dtype)
        check_compute_dtype(self.compute_dtype)
        if self.matmul_precision is not None:
            precision = read_precision(self.matmul_precision)
            if precision is None:
                raise PolicyError(
                    f"Unknown matmul precision {self.matmul_precision!r}. "
                    f"Write one of: {', '.join(precision_names())}."
                )
            object.__setattr__(self, "matmul_precision", precision)
        if self.reduce_dtype is not None:
            dtype = read_reduce_dtype(self.reduce_dtype, self.compute_dtype)
            object.__setattr__(self, "reduce_dtype", dtype)
        quantize = check_quantize(self.quantize, self.compute_dtype)
        object.__setattr__(self, "quantize", quantize)

    @property
    def lax_precision(self) -> jax.lax.Precision | jax.lax.DotAlgorithmPreset | None:
        """`matmul_precision` as the `precision=` argument of `jax.lax.dot_general`."""
        name = self.matmul_precision
        return None if name is None else lax_precision(name)

    def cast_to_param(self, x: T) -> T:
        """Casts the floating leaves of a tree to `param_dtype`.

        Args:
          x: any pytree. Integers, booleans, keys, complex, `None` and Python scalars
            pass unchanged, and so do float64 arrays of JAX and float8 unless this
            policy has a dtype of that kind. NumPy's float64 is cast, as jmp casts it.

        Returns:
          The tree with its floating leaves in `param_dtype`.

        Example:
          >>> import jax.numpy as jnp, jaxmp
          >>> jaxmp.get_policy("bf16-true").cast_to_param(jnp.ones(2)).dtype
          dtype(bfloat16)
        """
        return self._cast(x, self.param_dtype)

    def cast_to_compute(self, x: T) -> T:
        """Casts the floating leaves of a tree to `compute_dtype`.

        Args:
          x: any pytree; `cast_to_param` says which leaves are cast.

        Returns:
          The tree with its floating leaves in `compute_dtype`.

        Example:
          >>> import jax.numpy as jnp, jaxmp
          >>> jaxmp.get_policy("mixed_float16").cast_to_compute(jnp.ones(2)).dtype
          dtype('float16')
        """
        return self._cast(x, self.compute_dtype)

    def cast_to_output(self, x: T) -> T:
        """Casts the floating leaves of a tree to `output_dtype`.

        Args:
          x: any pytree; `cast_to_param` says which leaves are cast.

        Returns:
          The tree with its floating leaves in `output_dtype`.

        Example:
          >>> import jax.numpy as jnp, jaxmp
          >>> half = jnp.ones(2, jnp.float16)
          >>> jaxmp.get_policy("mixed_float16").cast_to_output(half).dtype
          dtype('float32')
        """
        return self._cast(x, self.output_dtype)

    def with_output_dtype(self, output_dtype: jax.typing.DTypeLike) -> "Policy":
        """Returns the same policy with another output dtype.

        Args:
          output_dtype: a floating dtype, scalar type or name.

        Returns:
          A new `Policy`.

        Raises:
          PolicyError: if it is not a floating dtype.

        Example:
          >>> import jaxmp
          >>> str(jaxmp.get_policy("mixed_bfloat16").with_output_dtype("bfloat16"))
          'p=full,c=bf16,o=bf16'
        """
        return dataclasses.replace(self, output_dtype=output_dtype)

    def _cast(self, tree: T, dtype: np.dtype) -> T:
        return _tree.cast_floating(tree, dtype, also=_dtypes(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, jmp.Policy):
            return NotImplemented
        return _dtypes(self) == _dtypes(other) and all(
            getattr(self, option) == getattr(other, option, None)
            for option in ("matmul_precision", "reduce_dtype", "quantize")
        )

    def __hash__(self) -> int:
        # As jmp.Policy hashes, whose dtypes are scalar types.
        return hash(tuple(dtype.type for dtype in _dtypes(self)))

    def __str__(self) -> str:
        names = [dtype_to_names[dtype.type][0] for dtype in _dtypes(self)]
        text = "p={},c={},o={}".format(*names)
        if self.matmul_precision is not None:
            text += f",matmul={self.matmul_precision}"
        if self.reduce_dtype is not None:
            text += f",reduce={self.reduce_dtype.name}"
        if self.quantize is not None:
            text += f",quantize={self.quantize}"
        return text


def _dtypes(policy: jmp.Policy) -> tuple[Any, ...]:
    """The three dtypes; None for an unknown one, since jmp.Policy checks nothing."""
    dtypes = (policy.param_dtype, policy.compute_dtype, policy.output_dtype)
    return tuple(map(read_dtype, dtypes))


PolicyLike: TypeAlias = str | jmp.Policy | DTypeLike
"""What `get_policy` reads: a string, a policy of jaxmp's or jmp's, or a dtype."""
