"""Runs a linen method in a region, as a lifted transformation.

Flax makes the module functional around it, as for `nn.remat`: variables and random keys
go in as arrays, and the variables that the method writes come out.
"""

from collections.abc import Callable
from typing import Any

from flax.core import lift
from flax.linen import transforms

from jaxmp.casting.local import run_region
from jaxmp.casting.plan.plan import JaxprPlan, Settings


def planned_method(
    method: Callable[..., Any],
    settings: Settings,
    named_scopes: bool,
    finish: Callable[[Any], Any],
    watch: Callable[[JaxprPlan], None],
    around_rules: Callable[[], Any],
) -> Callable[..., Any]:
    """Returns a method like `method` that runs in a region.

    Args:
      method: an unbound method of a linen class.
      settings, named_scopes: as for `run_region`.
      finish: function of its output, applied inside the region.
      watch: is called with the region's plan.
      around_rules: as for `run_region`.
    """

    def transform(fn: Callable[..., Any]) -> Callable[..., Any]:
        def inner(
            scope_fn: Callable[..., Any],
            repack_fn: Callable[..., Any],
            variables: Any,
            keys: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            def run(variables: Any, keys: Any, args: Any, kwargs: Any) -> Any:
                scope = scope_fn(variables, keys)
                output = finish(fn(scope, *args, **kwargs))
                return output, repack_fn(scope)

            arguments = (variables, keys, args, kwargs)
            return run_region(
                run, arguments, settings, named_scopes, watch, around_rules
            )

        return lift.pack(
            inner, (True,), (True,), (True,), name="policy", enable_kwargs=True
        )

    return transforms.lift_transform(transform, method)
