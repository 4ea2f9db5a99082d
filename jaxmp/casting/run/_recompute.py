"""Functions whose gradient computes again what is as large as their arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxmp._jaxpr.types import Array
from jaxmp.casting.islands._residuals import keep_small
from jaxmp.casting.run._anew import anew


def recomputed(
    run: Callable[..., list[Any]], is_elementwise: bool, limit: int
) -> Callable[..., list[Any]]:
    """The same function, whose gradient keeps its arguments and what is small.

    Nothing stops XLA from keeping what it would rather not compute again. Around a
    reduction a barrier would also stop it from fusing, which costs more traffic.
    Between two matmuls XLA would write an activation such as GELU in float32 beside its
    half result; there the backward pass computes it again from what counts as other
    arguments.

    Args:
      run: the function.
      is_elementwise: whether it is an activation.
      limit: how many elements a result may have to be kept.
    """
    if not is_elementwise:
        return jax.checkpoint(run, prevent_cse=False, policy=keep_small(limit))

    def tangents_of(primals: Sequence[Array], tangents: Sequence[Array]) -> list[Array]:
        primals = jax.tree.map(anew, primals)
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
