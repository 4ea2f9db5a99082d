"""One reduction per window: each device sums its own gradients, then all sum once.

The gradients of a part are mapped over an axis of devices, so nothing is summed over
devices while the micro-batches run. Gradients keep the loss scale until then, so that
small ones survive a sum in float16, and they are divided by the number of parts before
it, so that large ones do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.loss_scale.window import _sums
from jaxmp.loss_scale.window._arguments import Arguments
from jaxmp.loss_scale.window._axes import Axes
from jaxmp.loss_scale.window._cutting import Cut
from jaxmp.loss_scale.window._data_axes import WINDOW, DataAxes
from jaxmp.loss_scale.window._part import (
    Arrays,
    Part,
    Results,
    first_of,
    run_parts,
    trace_part,
)
from jaxmp.loss_scale.window._specs import Spec, Specs, read_specs


class Reduced(NamedTuple):
    """What the devices made of a batch together.

    Attributes:
      sums: the loss and the gradients, still under the loss scale.
      specs: how they lie over the mesh, None where the compiler decides.
      form: of the loss and the gradients.
      results: the rest, with a first axis of parts in the order of the batch.
    """

    sums: list[Any]
    specs: list[Spec]
    form: _sums.Form
    results: Results


def reduced_over_devices(
    value_and_grad: Callable[..., Any],
    arguments: Arguments,
    cut_batch: Cut,
    options: DataAxes,
    axes: Axes,
    divisor: Callable[[int], int],
) -> Reduced:
    """Runs the parts of a batch on the devices that hold them; call it `axes.inside`.

    Args:
      value_and_grad: function that returns `((loss, aux), grads)`, with gradients
        under the loss scale.
      arguments: its arguments, as they are outside.
      cut_batch: into which micro-batches each device cuts its examples.
      options: the dtype of the sum, and when weights are gathered.
      axes: of the mesh.
      divisor: by what the sum over this many parts is divided.

    Returns:
      Losses and gradients combined, and what else the parts returned.
    """
    count = cut_batch.count
    here = arguments.with_leaves(list(map(axes.enter, arguments.leaves)))
    cut = cut_batch(here, axes.size, lambda x: axes.split(x, count))
    whole = _whole(here, cut)
    part = trace_part(value_and_grad, here, whole, first_of(cut), axes)
    specs = read_specs(options, arguments, cut_batch.differentiated, part.form, axes)
    weights = _weights(whole, part, specs, options, axes)
    results = run_parts(part, weights, cut, count, axes)
    parts = count * axes.size

    def reduced(x: jax.Array, dtype: Any, spec: Any) -> jax.Array:
        total = axes.reduced(_sums.divided(x, parts), dtype, spec).astype(x.dtype)
        again = parts // divisor(parts)
        return total if again == 1 else total * jnp.asarray(again, total.dtype)

    loss, *grads = results.sums
    leaves = [reduced(loss, loss.dtype, None).astype(part.abstract.sums[0].dtype)]
    of_grads = zip(grads, part.form.summed[1:], specs.gradients[1:], strict=True)
    for x, is_summed, spec in of_grads:
        if is_summed:
            keeps = jnp.iscomplexobj(x) or options.reduce_dtype is None
            leaves.append(reduced(x, x.dtype if keeps else options.reduce_dtype, spec))
        else:  # FP8 metadata: the largest magnitude of any device is the batch's
            leaves.append(x.max(0))
    return Reduced(leaves, specs.gradients, part.form, results)


def _whole(arguments: Arguments, cut: Arrays) -> Arrays:
    """The weights, and all that models hold."""
    of_models = arguments.of_models()
    return {
        i: x
        for i, x in enumerate(arguments.leaves)
        if i not in cut and (i in of_models or _is_weight(x))
    }


def _is_weight(x: Any) -> bool:
    return isinstance(x, jax.Array) and _tree.is_inexact(x)


def _weights(
    whole: Arrays, part: Part, specs: Specs, options: DataAxes, axes: Axes
) -> Callable[[], Arrays]:
    """A function that gives one micro-batch its weights."""

    def gathered() -> Arrays:
        def gather(i: int, x: Any) -> Any:
            return axes.gathered(x, specs.weights[i], part.dtypes_read[i])

        return {i: gather(i, x) if _is_weight(x) else x for i, x in whole.items()}

    def as_stored(x: Any, stored: Any) -> Any:
        # The loss function casts it back: rounding a second time changes nothing.
        return x.astype(stored.dtype) if _is_weight(stored) else x

    if options.gather != WINDOW:
        return lambda: whole
    kept = gathered()
    return lambda: {i: as_stored(x, whole[i]) for i, x in kept.items()}
