"""How the layers of a module multiply, read from the plan of an example call."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxmp.casting.local import watching_plans
from jaxmp.casting.plan.plan import JaxprPlan
from jaxmp.casting.quantized.formats import MatmulFormat, formats_of
from jaxmp.errors import NothingQuantizedWarning
from jaxmp.modules._description import Row


def formats_in(call: Callable[..., Any], *args: Any) -> list[MatmulFormat]:
    """The formats of the matmuls of a call of a module with a policy.

    Args:
      call: the module, or its `apply`.
      *args: arrays or `jax.ShapeDtypeStruct`s. Nothing is computed.
    """
    plans: list[JaxprPlan] = []
    with watching_plans(plans.append), warnings.catch_warnings():
        # The rows say it.
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        jax.eval_shape(call, *args)
    return [found for plan in plans for found in formats_of(plan)]


def with_formats(rows: Iterable[Row], formats: Iterable[MatmulFormat]) -> list[Row]:
    """The rows of layers, with the recipe or the reason of their own matmuls.

    A matmul belongs to the innermost layer whose path it has.
    """
    rows = list(rows)
    paths = {row.path for row in rows}
    found: dict[str, dict[str, None]] = {}
    for matmul in formats:
        path = _layer_of(matmul.path, paths)
        text = matmul.recipe or f"half: {matmul.reason}"
        found.setdefault(path, {})[text] = None
    return [row._replace(multiplies=", ".join(found.get(row.path, ()))) for row in rows]


def _layer_of(path: str, layers: set[str]) -> str:
    while path and path not in layers:
        path = path.rpartition("/")[0]
    return path
