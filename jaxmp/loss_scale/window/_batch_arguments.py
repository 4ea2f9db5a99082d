"""Finds the arguments of a loss function that hold the batch.

These are all arguments that hold arrays with a first axis and are not differentiated.
Every case of doubt is an error that names the arrays, because cutting a weight in place
of a batch would silently give wrong gradients.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp.errors import MicroBatchError

Name = int | str
"""An argument: its position, or its keyword."""

# Classes from these modules hold weights and states. They are matched by name along
# the MRO, so that neither Flax nor Equinox has to be imported.
_STATES = (
    "flax.nnx",
    "flax.linen",
    "flax.training",
    "flax.core.scope",
    "equinox",
    "haiku",
    "optax",
    "jaxmp",
)
_WEIGHT_NAMES = {"kernel", "bias", "scale", "embedding", "mean", "var"}


def find_batch(
    given: Mapping[Name, Any], differentiated: Any, asked: str
) -> list[Name]:
    """Lists the arguments that are cut into parts.

    Args:
      given: the arguments, by position or keyword.
      differentiated: `argnums` of the transform.
      asked: the option that asks for the cut, as the user wrote it.

    Returns:
      Their names; at least one of them holds an array with a first axis.

    Raises:
      MicroBatchError: if first axes differ, if an argument may be a batch or a state,
        or if there is nothing to cut.
    """
    positions = sum(isinstance(name, int) for name in given)
    own = {i % positions for i in positions_of(differentiated)} if positions else set()
    rest = {name: x for name, x in given.items() if name not in own}
    states = [name for name, x in rest.items() if _is_state(x)]
    batch = [name for name in rest if name not in states and _has_arrays(rest[name])]
    sizes = {n for name in batch for n in leading_sizes(rest[name])}
    axes = [
        (name, path, x)
        for name in batch
        for path, x in jax.tree_util.tree_leaves_with_path(rest[name])
        if np.ndim(x) > 0 and _tree.is_array(x) and not _is_raw_key(x, sizes)
    ]
    if not axes:
        raise MicroBatchError(
            f"{asked} has nothing to cut: apart from what is "
            "differentiated, no argument holds an array with a first axis"
            f"{_states_message(states)}. Pass the batch as an argument of its own, or "
            "name it: batch_argnums=1."
        )
    _check_first_axes(axes)
    size = np.shape(axes[0][2])[0]
    for name in states:
        if leading_sizes(rest[name]) == {size}:
            _refuse_ambiguous(name, rest[name], size, batch)
    for name, x in rest.items():
        _refuse_python_numbers(name, x, size)
    for name, path, x in axes:
        if _may_be_raw_key(x):
            raise MicroBatchError(
                f"{argument_name(name, path)} is uint32{list(np.shape(x))}, which may "
                f"be a random key or {size} examples. Pass a key of jax.random.key, or "
                f"name what to cut: batch_argnums={tuple(batch)!r}."
            )
    return batch


def leading_sizes(tree: Any) -> set[int]:
    """The lengths of the first axes of the arrays in a tree, raw keys left out."""
    arrays = [x for x in jax.tree.leaves(tree) if _tree.is_array(x) and np.ndim(x)]
    return {np.shape(x)[0] for x in arrays if not _may_be_raw_key(x)}


def is_single_key(x: Any, sizes: Iterable[int]) -> bool:
    """Whether this is one random key, typed or raw, beside a batch of these sizes."""
    return (_is_key(x) and not np.ndim(x)) or _is_raw_key(x, sizes)


def argument_name(name: Name, path: Any = ()) -> str:
    """Writes an array of the arguments as `args[1]/x`."""
    root = f"args[{name}]" if isinstance(name, int) else name
    return f"{root}/{_tree.path_string(path)}".rstrip("/")


def _is_key(x: Any) -> bool:
    return _tree.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_raw_key(x: Any, sizes: Iterable[int]) -> bool:
    return _may_be_raw_key(x) and np.shape(x)[0] not in sizes


def _may_be_raw_key(x: Any) -> bool:
    # Two words for Threefry, four for the generators of XLA.
    return _tree.is_array(x) and x.dtype == jnp.uint32 and np.shape(x) in ((2,), (4,))


def positions_of(argnums: Any) -> Iterator[int]:
    """Reads `argnums` of JAX, or of nnx, which may hold `DiffState(argnum, filter)`."""
    for item in argnums if isinstance(argnums, (tuple, list)) else (argnums,):
        position = getattr(item, "argnum", item)
        if isinstance(position, int):
            yield position


def _is_state(x: Any) -> bool:
    nodes = jax.tree.leaves(x, is_leaf=_is_state_node)
    return any(map(_is_state_node, nodes)) or _is_variables(x)


def _is_state_node(x: Any) -> bool:
    return any(
        f"{cls.__module__}.".startswith(tuple(f"{module}." for module in _STATES))
        for cls in type(x).__mro__
    )


def _is_variables(x: Any) -> bool:
    """Whether all leaves of a nested dictionary have the names of Flax's parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(x)
    return (
        isinstance(x, Mapping)
        and bool(leaves)
        and all(
            len(path) > 1 and getattr(path[-1], "key", None) in _WEIGHT_NAMES
            for path, _ in leaves
        )
    )


def _has_arrays(x: Any) -> bool:
    return any(_tree.is_array(leaf) for leaf in jax.tree.leaves(x))


def _check_first_axes(axes: list[tuple[Name, Any, Any]]) -> None:
    first_name, first_path, first = axes[0]
    for name, path, x in axes[1:]:
        if np.shape(x)[0] == np.shape(first)[0]:
            continue
        size = np.shape(first)[0]
        named = {n for n, _, y in axes if np.shape(y)[0] != size}
        batch = [n for n in dict.fromkeys(n for n, _, _ in axes) if n not in named]
        raise MicroBatchError(
            f"{argument_name(first_name, first_path)} has the shape "
            f"{list(np.shape(first))} and {argument_name(name, path)} "
            f"{list(np.shape(x))}: their first axes differ, so they are not both the "
            f"batch. Name the arguments to cut{_for_example(batch)}; the others are "
            "passed whole."
        )


def _for_example(batch: list[Name]) -> str:
    if not batch:
        return " as batch_argnums"
    names = batch[0] if len(batch) == 1 else tuple(batch)
    return f", for example batch_argnums={names!r}"


def _refuse_ambiguous(name: Name, x: Any, size: int, batch: list[Name]) -> None:
    raise MicroBatchError(
        f"{argument_name(name)}, a {type(x).__name__}, may be a state or a part of the "
        f"batch: its arrays have the batch's first axis, {size}. Say what to cut: "
        f"batch_argnums={tuple(batch)!r} passes it whole, "
        f"batch_argnums={(*batch, name)!r} cuts it."
    )


def _refuse_python_numbers(name: Name, x: Any, size: int) -> None:
    def is_column(node: Any) -> bool:
        scalars = isinstance(node, (list, tuple)) and len(node) == size > 1
        return scalars and all(isinstance(item, _tree.SCALARS) for item in node)

    for path, node in jax.tree_util.tree_leaves_with_path(x, is_leaf=is_column):
        if is_column(node):
            raise MicroBatchError(
                f"{argument_name(name, path)} holds {size} Python numbers, as many as "
                "the batch has examples, and only arrays can be cut. Pass it through "
                "jnp.asarray(...)."
            )


def _states_message(states: list[Name]) -> str:
    if not states:
        return ""
    listed = ", ".join(map(argument_name, states))
    return f" (models and states such as {listed} are passed whole)"
