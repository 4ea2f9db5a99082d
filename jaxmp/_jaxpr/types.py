"""Names for what JAX leaves untyped, for signatures that say what they take."""

from collections.abc import Sequence
from typing import Any, TypeAlias

Jaxpr: TypeAlias = Any
"""A `jax.extend.core.Jaxpr`, or a `ClosedJaxpr`, which also holds its constants."""
Eqn: TypeAlias = Any
"""An equation of a jaxpr, `jax.extend.core.JaxprEqn`."""
Atom: TypeAlias = Any
"""What an equation reads: a variable or a literal."""
Var: TypeAlias = Any
"""A variable of a jaxpr."""
Array: TypeAlias = Any
"""A `jax.Array`, a tracer of one, or a NumPy array or scalar that stands for one."""
Arrays: TypeAlias = Sequence[Array]
