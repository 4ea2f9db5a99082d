"""Gradients of a large batch, part by part: one window of parts is one step.

Without devices, the parts are micro-batches, and a loop adds up what they return. With
`data_axes`, every device goes through micro-batches of its own examples.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp._tree import PyTree
from jaxmp.errors import DataAxesOptionError, MicroBatchError
from jaxmp.loss_scale.window import _sums
from jaxmp.loss_scale.window._arguments import Arguments, mean_of_parts
from jaxmp.loss_scale.window._batch_arguments import Name
from jaxmp.loss_scale.window._cutting import Cut, interleaved
from jaxmp.loss_scale.window._data_axes import DataAxes, read_data_axes
from jaxmp.loss_scale.window._data_parallel import reduced_over_devices
from jaxmp.loss_scale.window._part import Results, first_of, run_parts, trace_part

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

    def check_unscaled(self) -> None:
        """Raises unless gradients may be summed without a loss scale.

        Raises:
          DataAxesOptionError: if they would be summed in float16.
        """
        dtype = None if self.devices is None else self.devices.reduce_dtype
        if dtype == jnp.float16:
            raise DataAxesOptionError(
                "reduce_dtype='float16' under NoOpLossScale() would sum gradients "
                "without a loss scale, and small ones are zero in float16. Pass the "
                "state of a loss scale, or use reduce_dtype='bfloat16'."
            )

    def __call__(
        self,
        value_and_grad: Callable[..., Any],
        unscale: Callable[[PyTree, jax.Array], PyTree],
        scale: jax.Array,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[jax.Array, Any], PyTree]:
        """Combines losses and gradients of all parts, in float32 at least.

        Args:
          value_and_grad: function of a loss scale and arguments that returns
            `((loss, aux), grads)`, with gradients under the scale.
          unscale: takes a loss scale out of gradients.
          scale: the loss scale.
          args: positional arguments of the loss function.
          kwargs: its keyword arguments.

        Returns:
          `((loss, aux), grads)`, with true gradients.
        """
        arguments = Arguments(args, kwargs)
        if self.devices is not None:
            return self._on_devices(
                value_and_grad, unscale, scale, arguments, self.devices
            )

        def true_value_and_grad(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
            value, grads = value_and_grad(scale, *args, **kwargs)
            return value, unscale(grads, scale)

        loss, grads, results = self._one_by_one(true_value_and_grad, arguments)
        aux, changed = self._finished(results, arguments)
        arguments.write(changed)
        return (loss, aux), grads

    def _on_devices(
        self,
        value_and_grad: Callable[..., Any],
        unscale: Callable[[PyTree, jax.Array], PyTree],
        scale: jax.Array,
        arguments: Arguments,
        devices: DataAxes,
    ) -> tuple[tuple[jax.Array, Any], PyTree]:
        axes = devices.on(arguments.leaves)
        with axes.inside():
            reduced = reduced_over_devices(
                functools.partial(value_and_grad, axes.enter(scale)),
                arguments,
                self.cut,
                devices,
                axes,
                self._divisor,
            )
            aux, changed = self._finished(reduced.results, arguments)
        sums = map(axes.leave, reduced.sums, reduced.specs)
        loss, grads = reduced.form.tree(list(sums))
        along = axes.along if self.aux == STACK else None
        aux = jax.tree.map(lambda x: axes.leave(x, along), aux)
        arguments.write({i: axes.leave(x, None) for i, x in changed.items()})
        return (loss, aux), unscale(grads, scale)

    def _finished(
        self, results: Results, arguments: Arguments
    ) -> tuple[PyTree, dict[int, Any]]:
        """The auxiliary outputs, and what models hold from now on."""
        changed = results.changed.items()
        new = {i: mean_of_parts(x, arguments.leaves[i]) for i, x in changed}
        return jax.tree.map(self._finish_aux, results.aux), new

    def _divisor(self, parts: int) -> int:
        return parts if self.loss_is == MEAN else 1

    def _one_by_one(
        self, value_and_grad: Callable[..., Any], arguments: Arguments
    ) -> tuple[Any, PyTree, Results]:
        count = self.cut.count
        cut = self.cut(arguments, None, lambda x: interleaved(x, count))
        whole = {i: x for i, x in arguments.of_models().items() if i not in cut}
        part = trace_part(value_and_grad, arguments, whole, first_of(cut), None)
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
