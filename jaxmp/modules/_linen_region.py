"""A linen method whose operations are planned, as a lifted transformation.

Flax functionalises the module around it, as for `nn.remat`: variables and random keys
go in as arrays, and what the method writes comes out.
"""

from collections.abc import Callable
from typing import Any

from flax.core import lift
from flax.linen import transforms

from jaxmp.casting.local import run_region
from jaxmp.casting.plan.plan import Settings


def planned_method(
    method: Callable[..., Any],
    settings: Settings,
    named_scopes: bool,
    finish: Callable[[Any], Any],
    watch: Callable[[Any], None],
    around_rules: Callable[[], Any],
) -> Callable[..., Any]:
    """Returns a method like `method`, run in a region.

    Args:
      method: an unbound method of a linen class.
      settings, named_scopes: as for `run_region`.
      finish: what happens to its output inside of the region.
      watch: is shown the region's plan.
      around_rules: as for `run_region`.
    """

    def transform(fn):
        def inner(scope_fn, repack_fn, variables, keys, *args, **kwargs):
            def run(variables, keys, args, kwargs):
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
