"""For tests of mixed precision: assertions, small networks, and readers of jaxprs."""

from typing import TYPE_CHECKING, Any

from jaxmp.testing._assert_matmuls import assert_matmuls_in, assert_matmuls_in_half
from jaxmp.testing._assertions import (
    assert_max_traces,
    assert_no_upcast,
    assert_precision_close,
)
from jaxmp.testing._equations import Matmul, equations, matmuls

if TYPE_CHECKING:
    from jaxmp.testing._zoo import ZooModel, zoo

__all__ = [
    "assert_no_upcast",
    "assert_matmuls_in",
    "assert_matmuls_in_half",
    "assert_max_traces",
    "assert_precision_close",
    "ZooModel",
    "zoo",
    "Matmul",
    "equations",
    "matmuls",
]


# The zoo imports Flax.
def __getattr__(name: str) -> Any:
    if name in ("ZooModel", "zoo"):
        from jaxmp.testing import _zoo

        return getattr(_zoo, name)
    raise AttributeError(f"module 'jaxmp.testing' has no attribute {name!r}")
