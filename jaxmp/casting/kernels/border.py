"""The border between half values and code that was written for float32."""

from typing import Any

import jax
from jax.extend import source_info_util

from jaxmp import _tree
from jaxmp._jaxpr.marks import BORDER_SCOPE

# A cast is made for the code that reads the value.
source_info_util.register_exclusion(__file__)


def shown(value: Any, dtype: Any) -> Any:
    """Shows half arrays in a wider dtype; it is a view for the code, and no cast."""

    def show(x: Any) -> Any:
        is_half = isinstance(x, jax.Array) and x.dtype in _tree.HALF
        return x.astype(dtype) if is_half else x

    with jax.named_scope(BORDER_SCOPE):
        return jax.tree.map(show, value)
