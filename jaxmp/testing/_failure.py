"""How an assertion fails.

Each raises an `AssertionError` that begins with `[jaxmp] Assertion <name> failed:` and
names the line or the leaf at fault.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InvalidAssertion
from jaxmp.policy.dtypes import read_dtype

_MOST = 5


def fail(name: str, message: str) -> NoReturn:
    """Raises the `AssertionError` of the assertion called `name`."""
    raise AssertionError(f"[jaxmp] Assertion {name} failed: {message}")


def listed(items: Iterable[Any]) -> str:
    """The first few items, one a line."""
    lines = list(map(str, items))
    more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "".join(f"\n  {line}" for line in [*lines[:_MOST], *more])


def floating_dtype(dtype: Any) -> np.dtype:
    """Reads a floating dtype; `InvalidAssertion` for anything else."""
    found = read_dtype(dtype)
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise InvalidAssertion(
            f"{dtype!r} is not a floating dtype. Write 'bfloat16', 'float16', "
            "'float32', or a dtype such as jnp.bfloat16."
        )
    return found
