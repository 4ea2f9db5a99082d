"""How weights and gradients lie over a mesh, by leaf."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmp import _tree
from jaxmp.errors import DataAxesOptionError
from jaxmp.loss_scale.window._arguments import Arguments
from jaxmp.loss_scale.window._axes import Axes
from jaxmp.loss_scale.window._batch_arguments import positions_of
from jaxmp.loss_scale.window._data_axes import DataAxes
from jaxmp.loss_scale.window._sums import Form

Spec = PartitionSpec | None


class Specs(NamedTuple):
    """What is known of where arrays lie; None where nothing is.

    Attributes:
      gradients: for the loss and each gradient, as `Form` lists them.
      weights: for each leaf of the arguments.
    """

    gradients: list[Spec]
    weights: list[Spec]


def read_specs(
    options: DataAxes, arguments: Arguments, differentiated: Any, form: Form, axes: Axes
) -> Specs:
    """Finds out how weights lie, and how gradients shall.

    Args:
      options: with the user's `grad_shardings`, which come first.
      arguments: of the loss function.
      differentiated: `argnums`.
      form: of the loss and the gradients.
      axes: of the mesh.

    Raises:
      DataAxesOptionError: if `grad_shardings` is not a tree of shardings, or does not
        fit the gradients.
    """
    weights = [axes.spec_of(x) for x in arguments.leaves]
    places = list(_places(arguments, differentiated, form))
    known = [None if i is None else weights[i] for i in places]
    if options.grad_shardings is not None:
        known = [None, *_read(options.grad_shardings, form)]
        for i, spec in zip(places, known, strict=True):
            if i is not None and weights[i] is None:
                weights[i] = spec
    kept = [spec for spec, gone in zip(known, form.float0, strict=True) if gone is None]
    return Specs(kept, weights)


def _places(
    arguments: Arguments, differentiated: Any, form: Form
) -> Iterator[int | None]:
    """The leaf of the arguments that each leaf of `(loss, grads)` is a gradient of."""
    several = isinstance(differentiated, (tuple, list))
    count = sum(isinstance(name, int) for name in arguments.given)
    positions = [i % count for i in positions_of(differentiated)] if count else []
    leaves = {
        (arguments.name(i), _tree.path_string(path[1:])): i
        for i, path in enumerate(arguments.paths)
    }
    for path in form.paths:
        _, *inside = path
        position = positions[0] if positions else None
        if several and inside:
            first, *inside = inside
            at = getattr(first, "idx", len(positions))
            position = positions[at] if at < len(positions) else None
        is_loss = getattr(path[0], "idx", None) == 0
        if is_loss or position is None:
            yield None
        else:
            yield leaves.get((position, _tree.path_string(tuple(inside))))


def _read(shardings: Any, form: Form) -> list[Spec]:
    """The spec of each gradient, from the user's tree or a prefix of it."""
    grads = form.tree_of(range(len(form.float0)))[1]
    count = len(jax.tree.leaves(grads))
    given = jax.tree.leaves(shardings, is_leaf=_is_spec)
    if len(given) != count:
        try:
            full = jax.tree.broadcast(shardings, grads, is_leaf=_is_spec)
        except ValueError as error:
            raise DataAxesOptionError(
                f"grad_shardings has {len(given)} leaves and there are {count} "
                f"gradients: {error} Pass a tree like the gradients, with a "
                "NamedSharding, a PartitionSpec or None for each, or a prefix of it."
            ) from error
        given = jax.tree.leaves(full, is_leaf=_is_spec)
    return [_as_spec(x) for x in given]


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (PartitionSpec, jax.sharding.Sharding))


def _as_spec(x: Any) -> Spec:
    if isinstance(x, NamedSharding):
        return x.spec
    if x is None or isinstance(x, PartitionSpec):
        return x
    raise DataAxesOptionError(
        f"grad_shardings holds {x!r}, which does not say how a gradient lies over the "
        "mesh. Use a NamedSharding, a PartitionSpec, or None for no wish."
    )
