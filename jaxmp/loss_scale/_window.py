"""Gradients of a large batch, part by part: one window of parts is one step.

Without devices, the parts are micro-batches, and a loop adds up what they return. With
`data_axes`, every device goes through micro-batches of its own examples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxmp import _tree
from jaxmp._tree import PyTree
from jaxmp.errors import DataAxesOptionError, MicroBatchError
from jaxmp.loss_scale import _sums
from jaxmp.loss_scale._arguments import Arguments, mean_of_parts
from jaxmp.loss_scale._batch_arguments import Name
from jaxmp.loss_scale._cutting import Cut, interleaved
from jaxmp.loss_scale._data_axes import DataAxes, read_data_axes
from jaxmp.loss_scale._data_parallel import sums_over_devices
from jaxmp.loss_scale._part import Results, first_of, run_parts, trace_part

STACK, MEAN, SUM = "stack", "mean", "sum"


@dataclasses.dataclass(frozen=True)
class Window:
    """How a batch is cut, and what becomes of what its parts return.

    Attributes:
      cut: into which parts.
      aux: `STACK` or `MEAN`, for auxiliary outputs.
      loss_is: `MEAN` or `SUM`, over examples.
      devices: the axes of the mesh that the parts lie on, or None.
    """

    cut: Cut
    aux: str
    loss_is: str
    devices: DataAxes | None

    def __post_init__(self) -> None:
        if self.aux not in (STACK, MEAN):
            raise MicroBatchError(
                f"micro_batch_aux={self.aux!r} is neither {STACK!r}, which gives every "
                f"auxiliary output an axis of parts, nor {MEAN!r}."
            )

    def __call__(
        self,
        value_and_grad: Callable[..., Any],
        unscale: Callable[[PyTree], PyTree],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[jax.Array, Any], PyTree]:
        """Combines losses and gradients of all parts, in float32 at least.

        Args:
          value_and_grad: function that returns `((loss, aux), grads)`, with gradients
            under the loss scale.
          unscale: takes the loss scale out of gradients.
          args: positional arguments of `value_and_grad`.
          kwargs: its keyword arguments.

        Returns:
          `((loss, aux), grads)`, with true gradients.
        """
        arguments = Arguments(args, kwargs)
        if self.devices is None:
            loss, grads, results = self._one_by_one(value_and_grad, unscale, arguments)
        else:
            axes = self.devices.on(arguments.leaves)
            loss, grads, results = sums_over_devices(
                value_and_grad, arguments, self.cut, self.devices, axes, self._divisor
            )
            grads = unscale(grads)
        changed = results.changed.items()
        arguments.write({i: mean_of_parts(x, arguments.leaves[i]) for i, x in changed})
        return (loss, jax.tree.map(self._finish_aux, results.aux)), grads

    def _divisor(self, parts: int) -> int:
        return parts if self.loss_is == MEAN else 1

    def _one_by_one(
        self,
        value_and_grad: Callable[..., Any],
        unscale: Callable[[PyTree], PyTree],
        arguments: Arguments,
    ) -> tuple[Any, PyTree, Results]:
        def unscaled(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
            value, grads = value_and_grad(*args, **kwargs)
            return value, unscale(grads)

        count = self.cut.count
        cut = self.cut(arguments, None, lambda x: interleaved(x, count))
        whole = {i: x for i, x in arguments.of_models().items() if i not in cut}
        part = trace_part(unscaled, arguments, whole, first_of(cut), None)
        results = run_parts(part, lambda: whole, cut, count, None)
        leaves = [
            _sums.divided(x, self._divisor(count)).astype(one.dtype) if summed else x
            for x, one, summed in zip(
                results.sums, part.abstract.sums, part.form.summed, strict=True
            )
        ]
        return *part.form.tree(leaves), results

    def _finish_aux(self, x: jax.Array) -> jax.Array:
        if self.aux == STACK:
            return x
        if not _tree.is_inexact(x):
            return x[-1]
        return _tree.at_least_float32(x).mean(0).astype(x.dtype)


def read_window(
    micro_batches: int | None,
    batch: Sequence[Name] | None,
    differentiated: Any,
    aux: str,
    loss_is: str,
    data_axes: str | Sequence[str] | None,
    options: Mapping[str, Any],
) -> Window | None:
    """Reads the options of `value_and_grad` that cut a batch.

    Returns:
      None if nothing is to be cut.

    Raises:
      MicroBatchError: for a wrong number of micro-batches.
      DataAxesOptionError: for any other option that has no meaning.
    """
    if loss_is not in (MEAN, SUM):
        raise DataAxesOptionError(
            f"loss_is={loss_is!r} is neither {MEAN!r} nor {SUM!r}: what the loss "
            "function makes of the examples of its batch."
        )
    devices = read_data_axes(data_axes, options)
    if devices is None and micro_batches is None:
        return None
    return Window(Cut(micro_batches, batch, differentiated), aux, loss_is, devices)
