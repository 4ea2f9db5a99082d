"""Cuts a batch into parts: over micro-batches, over devices, or both."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp.errors import MicroBatchError
from jaxmp.loss_scale.window._arguments import Arguments
from jaxmp.loss_scale.window._batch_arguments import (
    Name,
    argument_name,
    find_batch,
    is_single_key,
    leading_sizes,
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Into which parts a batch is cut, and what is cut.

    Attributes:
      micro_batches: how many run one after the other; None where none were asked for.
      batch: positions and keywords of the arguments to cut; None finds them.
      differentiated: `argnums` of the transform: never cut unless `batch` says so.
    """

    micro_batches: int | None
    batch: Sequence[Name] | None
    differentiated: Any

    def __post_init__(self) -> None:
        count = self.count
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise MicroBatchError(
                f"micro_batches={count!r} is not a number of micro-batches. Use "
                "an integer of at least 1 that divides the batch size."
            )

    @property
    def count(self) -> int:
        """The number of micro-batches, at least 1."""
        return 1 if self.micro_batches is None else self.micro_batches

    def __call__(
        self,
        arguments: Arguments,
        devices: int | None,
        split: Callable[[jax.Array], jax.Array],
    ) -> dict[int, Any]:
        """Cuts the arrays of the batch; scalars go to every part whole.

        Args:
          arguments: those of the loss function.
          devices: over how many devices each micro-batch lies; None for no axis of
            devices.
          split: brings an array of the batch into the form `[micro_batches, examples,
            ...]`, or `[micro_batches, devices, examples, ...]`.

        Returns:
          The arrays that were cut, by leaf. A random key is split, one for each part;
          so are the keys of the random streams in nnx models.

        Raises:
          MicroBatchError: for a batch that cannot be found or does not divide.
        """
        given = arguments.given
        chosen = self._chosen(given, devices)
        sizes = {size for name in chosen for size in leading_sizes(given[name])}
        shape = (self.count,) if devices is None else (self.count, devices)
        keys = set(arguments.keys_of_models())
        cut = {}
        for i, x in enumerate(arguments.leaves):
            is_batch = arguments.name(i) in chosen and _tree.is_array(x)
            if i in keys or (is_batch and is_single_key(x, sizes)):
                cut[i] = _split_key(x, shape)
            elif is_batch and np.ndim(x) > 0:
                self._check_divides(arguments, i, devices)
                cut[i] = split(jnp.asarray(x))
        return cut

    def _chosen(self, given: dict[Name, Any], devices: int | None) -> list[Name]:
        if self.batch is None:
            asked = f"micro_batches={self.count}" if devices is None else "data_axes"
            return find_batch(given, self.differentiated, asked)
        positions = sum(isinstance(name, int) for name in given)
        return [_existing(name, given, positions) for name in self.batch]

    def _check_divides(self, arguments: Arguments, i: int, devices: int | None) -> None:
        size, *rest = np.shape(arguments.leaves[i])
        if size % (self.count * (devices or 1)) == 0:
            return
        if devices is None:
            parts, repair = (
                f"{self.count} micro-batches",
                "a number that divides the first axis of every array of the batch",
            )
        elif self.micro_batches is None:
            parts, repair = f"{devices} devices", f"a batch that {devices} divides"
        else:
            parts = f"{devices} devices with {self.count} micro-batches each"
            repair = f"a batch that {devices * self.count} divides"
        raise MicroBatchError(
            f"{argument_name(arguments.name(i), arguments.paths[i][1:])} has the shape "
            f"{[size, *rest]}, which {parts} cannot share. Use {repair}, and pass what "
            "has no such axis as another argument."
        )


def interleaved(x: jax.Array, count: int) -> jax.Array:
    """Gives part j the examples j, j + count, j + 2 count, ...

    Consecutive examples of a batch that is sharded over devices would all lie on one.
    """
    size, *rest = x.shape
    return x.reshape(size // count, count, *rest).swapaxes(0, 1)


def _split_key(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    parts = jax.random.split(key, math.prod(shape))
    return parts.reshape(*shape, *parts.shape[1:])


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
