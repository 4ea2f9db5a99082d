"""Names for what a plan decides, `jaxmp/<region>/<dtype>`, in dumps and profiles."""

import functools
from typing import Any

import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.scopes import scope_parts
from jaxmp.casting.islands._islands import Island
from jaxmp.casting.ops._op_lists import OpClass
from jaxmp.casting.plan.plan import EqnPlan
from jaxmp.casting.plan.states import FLOAT32

_NAMES = {
    OpClass.COMPUTE: "matmul",
    OpClass.FULL: "full",
    OpClass.FOLLOW: "follow",
}


def region_of(plan: EqnPlan) -> tuple[Any, ...]:
    """The name scope of an operation on its own; none if nothing is decided about it.

    Returns:
      What its name stack is extended by.
    """
    if plan.call is not None or plan.op_class not in _NAMES:
        return ()
    dtype = next((dtype for dtype in plan.in_dtypes if dtype is not None), None)
    if dtype is None or (plan.op_class is OpClass.FOLLOW and dtype not in _tree.HALF):
        return ()
    return _scopes(_NAMES[plan.op_class], dtype)


def region_of_island(island: Island) -> tuple[Any, ...]:
    """The name scope of a float32 island."""
    return _scopes("island" if island.softmax is None else "softmax", FLOAT32)


@functools.lru_cache(maxsize=64)
def _scopes(region: str, dtype: np.dtype) -> tuple[Any, ...]:
    return scope_parts(f"jaxmp/{region}/{dtype}")
