"""Functions whose gradient keeps their arguments and computes all else again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxmp._jaxpr.types import Array
from jaxmp.casting.run._barriers import gpu_barrier


def recomputed(
    run: Callable[..., list[Any]], is_elementwise: bool
) -> Callable[..., list[Any]]:
    """The same function, whose gradient keeps its arguments only.

    Nothing stops XLA from keeping what it would rather not compute again. Around a
    reduction a barrier would also stop it from fusing, which costs more traffic.
    Between two matmuls XLA for GPUs would write an activation such as GELU in float32
    beside its half result; there the backward pass starts from behind a barrier.
    """
    if not is_elementwise:
        return jax.checkpoint(run, prevent_cse=False)

    def tangents_of(primals: Sequence[Array], tangents: Sequence[Array]) -> list[Array]:
        primals = jax.tree.map(gpu_barrier, primals)
        return jax.jvp(run, primals, tangents)[1]

    again = jax.checkpoint(tangents_of, prevent_cse=False)

    @jax.custom_jvp
    def activation(*args: Array) -> list[Array]:
        return run(*args)

    @activation.defjvp
    def _(
        primals: Sequence[Array], tangents: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        return activation(*primals), again(primals, tangents)

    return activation
