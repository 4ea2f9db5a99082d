"""Looks at every operation in a `shard_map`, on all devices at once.

Collectives run only where the devices meet. So the body runs as it is, in one
`shard_map`, and returns the operands and results of its operations beside its own
outputs, with a first axis for the devices.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmp._jaxpr.calls import held
from jaxmp._jaxpr.types import Array, Arrays, Jaxpr
from jaxmp._jaxpr.versions import shard_map_arguments
from jaxmp.numerics.replay._site import ReplaySite


class Record(NamedTuple):
    """One operation inside; floating values have a first axis for the devices."""

    site: ReplaySite
    operands: list[Array]
    results: list[Array]


Observer: TypeAlias = Callable[[ReplaySite, Arrays, Arrays], None]


def run_shards(
    site: ReplaySite,
    operands: Arrays,
    run: Callable[[Jaxpr, Arrays, Observer], list[Array]],
) -> tuple[list[Array], list[Record]]:
    """Runs a `shard_map` and returns its results and what happened inside.

    Args:
      site: the equation.
      operands: its operands.
      run: `run(body, args, record)` runs a jaxpr on tracers and calls
        `record(site, operands, results)` for each operation.
    """
    arguments = shard_map_arguments(site.eqn.params)
    (inside,) = held(site.eqn)
    names = arguments["axis_names"]
    axes = tuple(name for name in arguments["mesh"].axis_names if name in names)
    sites: list[ReplaySite] = []
    counts: list[tuple[int, int]] = []

    def body(*args: Array) -> tuple[tuple[Array, ...], list[Array]]:
        sites.clear()
        counts.clear()
        shown = []

        def record(site: ReplaySite, operands: Arrays, results: Arrays) -> None:
            floats = [list(filter(_is_float, values)) for values in (operands, results)]
            sites.append(site)
            counts.append((len(floats[0]), len(floats[1])))
            shown.extend(x[None] for values in floats for x in values)

        outs = run(inside, args, record)
        return tuple(outs), shown

    out_specs = (tuple(arguments["out_specs"]), PartitionSpec(axes))
    sharded = jax.shard_map(body, **{**arguments, "out_specs": out_specs})
    outs, shown = jax.jit(sharded)(*operands)
    values = iter(shown)
    records = [
        Record(site, [next(values) for _ in range(n)], [next(values) for _ in range(m)])
        for site, (n, m) in zip(sites, counts, strict=True)
    ]
    return list(outs), records


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
