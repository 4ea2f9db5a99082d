"""Gradients of a large batch with the memory of a small one: a scan inside one step.

Micro-batch j of k takes the examples j, j + k, j + 2k, ... of the batch. On one device,
consecutive examples would do as well; in a batch that is sharded over devices, they
would all be on the same one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._tree import PyTree
from jaxmp.errors import MicroBatchError
from jaxmp.loss_scale._batch_arguments import (
    Name,
    argument_name,
    find_batch,
    is_single_key,
    leading_sizes,
)
from jaxmp.loss_scale.unscale import is_fp8_metadata

STACK, MEAN = "stack", "mean"


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """How a batch is cut, and what becomes of the auxiliary outputs."""

    count: int
    batch: Sequence[Name] | None
    """Positions and keywords of the arguments to cut; None finds them."""
    differentiated: Any
    """`argnums` of the transform: never cut unless `batch` says so."""
    aux: str = STACK

    def __post_init__(self) -> None:
        is_count = isinstance(self.count, int) and not isinstance(self.count, bool)
        if not is_count or self.count < 1:
            raise MicroBatchError(
                f"micro_batches={self.count!r} is not a number of micro-batches. Use "
                "an integer of at least 1 that divides the batch size."
            )
        if self.aux not in (STACK, MEAN):
            raise MicroBatchError(
                f"micro_batch_aux={self.aux!r} is neither {STACK!r}, which gives every "
                f"auxiliary output an axis of micro-batches, nor {MEAN!r}."
            )

    def __call__(
        self,
        value_and_grad: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[jax.Array, Any], PyTree]:
        """Averages losses and gradients over micro-batches, in float32 at least.

        Args:
          value_and_grad: function that returns `((loss, aux), grads)`.
          args: its positional arguments.
          kwargs: its keyword arguments.

        Returns:
          `((loss, aux), grads)`, in the dtypes that `value_and_grad` returns.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        cut = self._cut(args, kwargs)

        def run(micro_batch: dict[int, Any]) -> tuple[tuple[Any, Any], Any]:
            part = [micro_batch.get(i, x) for i, x in enumerate(leaves)]
            some_args, some_kwargs = jax.tree.unflatten(structure, part)
            (loss, aux), grads = value_and_grad(*some_args, **some_kwargs)
            return (loss, grads), aux

        def add(totals: list[Any], micro_batch: dict[int, Any]) -> tuple[Any, Any]:
            results, aux = run(micro_batch)
            return _add(totals, results), aux

        first = jax.tree.map(lambda x: x[0], cut)
        results, _ = jax.eval_shape(run, first)
        zeros = [_zeros(x) for x in _carried(results)]
        totals, aux = jax.lax.scan(add, zeros, cut, length=self.count)
        loss, grads = _average(totals, results, self.count)
        return (loss, jax.tree.map(self._finish_aux, aux)), grads

    def _cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
        """Cuts the arrays of the batch; scalars go to every part whole."""
        given: dict[Name, Any] = {**dict(enumerate(args)), **kwargs}
        if self.batch is None:
            chosen = find_batch(given, self.differentiated, self.count)
        else:
            positions = sum(isinstance(name, int) for name in given)
            chosen = [_existing(name, given, positions) for name in self.batch]
        sizes = {size for name in chosen for size in leading_sizes(given[name])}
        cut = {}
        paths = jax.tree_util.tree_leaves_with_path((args, kwargs))
        for i, ((_, argument, *inside), x) in enumerate(paths):
            name = getattr(argument, "key", getattr(argument, "idx", None))
            if name not in chosen or not _tree.is_array(x):
                continue
            if is_single_key(x, sizes):
                cut[i] = jax.random.split(x, self.count)
            elif np.ndim(x) > 0:
                cut[i] = self._interleaved(x, name, tuple(inside))
        return cut

    def _interleaved(self, x: Any, name: Name, path: Any) -> jax.Array:
        size, *rest = np.shape(x)
        if size % self.count:
            raise MicroBatchError(
                f"{argument_name(name, path)} has the shape {[size, *rest]}, which "
                f"{self.count} micro-batches cannot share. Use a number that divides "
                "the first axis of every array of the batch, and pass what has no such "
                "axis as another argument."
            )
        x = jnp.asarray(x).reshape(size // self.count, self.count, *rest)
        return x.swapaxes(0, 1)

    def _finish_aux(self, x: jax.Array) -> jax.Array:
        if self.aux == STACK:
            return x
        if not _tree.is_inexact(x):
            return x[-1]
        return _tree.at_least_float32(x).mean(0).astype(x.dtype)


def _existing(name: Name, given: dict[Name, Any], positions: int) -> Name:
    if isinstance(name, int) and name < 0:
        name += positions
    if name not in given:
        raise MicroBatchError(
            f"batch_argnums names argument {name!r}, and there are {positions} by "
            f"position{_keywords(given)}. Name those that hold the batch, by position "
            "or by keyword, as they are passed."
        )
    return name


def _keywords(given: dict[Name, Any]) -> str:
    keywords = [name for name in given if isinstance(name, str)]
    return f" and {keywords} by keyword" if keywords else ""


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, jnp.float32 if x.dtype in _tree.HALF else x.dtype)


def _carried(tree: PyTree) -> list[Any]:
    """Lists the leaves that a scan can carry: all but float0, which has no values."""
    return [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]


def _is_summed(path: Any, x: Any) -> bool:
    """Whether this is a gradient to sum; FP8 metadata is the new value itself."""
    return jnp.issubdtype(x.dtype, jnp.inexact) and not is_fp8_metadata(path)


def _add(totals: list[jax.Array], results: PyTree) -> list[jax.Array]:
    remaining = iter(totals)

    def add(path: Any, x: Any) -> Any:
        if x.dtype == jax.dtypes.float0:
            return x
        total = next(remaining)
        return total + x.astype(total.dtype) if _is_summed(path, x) else x

    return _carried(jax.tree_util.tree_map_with_path(add, results))


def _average(totals: list[jax.Array], results: PyTree, count: int) -> PyTree:
    remaining = iter(totals)

    def average(path: Any, x: Any) -> Any:
        if x.dtype == jax.dtypes.float0:
            return np.zeros(x.shape, x.dtype)
        total = next(remaining)
        if not _is_summed(path, x):
            return total
        return (total / np.asarray(count, total.dtype)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(average, results)
