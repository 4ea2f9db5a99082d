"""The file of a bad batch: trees of arrays of any dtype, and their structure."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import SequenceKey

from jaxmp import _tree
from jaxmp._jaxpr.types import Array
from jaxmp._tree import PyTree
from jaxmp.errors import NumericsError


class Saved(NamedTuple):
    """One pytree of a file: its leaves, and the path of each as names and places."""

    paths: list[list[str | int]]
    leaves: list[Array]

    def restored(self, name: str, like: PyTree) -> PyTree:
        """The tree in the structure of another one; dictionaries and lists if None.

        Args:
          name: of the tree, for an error.
          like: a tree of the same shapes, or None.

        Raises:
          NumericsError: if the shapes differ.
        """
        if like is None:
            return _nested(self.paths, self.leaves) if self.leaves else None
        shapes = [np.shape(x) for x in self.leaves]
        wanted = [np.shape(x) for x in jax.tree.leaves(like)]
        if shapes != wanted:
            raise NumericsError(
                f"The {name} in the file has arrays of the shapes {shapes}, and "
                f"{name}= has {wanted}. Pass one of the same structure, or none."
            )
        return jax.tree.unflatten(jax.tree.structure(like), self.leaves)


def write(path: str | os.PathLike[str], trees: NamedTuple) -> None:
    """Writes pytrees to a file, which is replaced only when it is complete."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    arrays = {str(i): _to_numpy(x) for i, (_, x) in enumerate(leaves)}
    index = [[_steps_of(path), _type_of(x)] for path, x in leaves]
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, index=json.dumps(index), **arrays)
    temporary.replace(path)


def read(path: str | os.PathLike[str], names: tuple[str, ...]) -> dict[str, Saved]:
    """Reads what `write` wrote, by the names of the tuple.

    Raises:
      NumericsError: if the file is another one.
    """
    saved = {name: Saved([], []) for name in names}
    try:
        with Path(path).open("rb") as opened, np.load(opened) as file:
            for i, (steps, type_name) in enumerate(json.loads(str(file["index"]))):
                saved[steps[0]].paths.append(steps[1:])
                saved[steps[0]].leaves.append(_from_numpy(file[str(i)], type_name))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise NumericsError(
            f"{os.fspath(path)!r} is not a bad batch. Pass a file that "
            "BadBatch.save(path) wrote."
        ) from error
    return saved


# Arrays


def _is_key(x: Array) -> bool:
    return _tree.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _type_of(x: Array) -> str:
    if _is_key(x):
        return f"key<{jax.random.key_impl(x)}>"
    return np.asarray(x).dtype.name


def _to_numpy(x: Array) -> np.ndarray:
    x = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    # NumPy's files know the bytes of bfloat16 and float8 numbers, but not their names.
    return x.view(f"u{x.dtype.itemsize}") if x.dtype.kind == "V" else x


def _from_numpy(x: np.ndarray, type_name: str) -> Array:
    if type_name.startswith("key<"):
        return jax.random.wrap_key_data(jnp.asarray(x), impl=type_name[4:-1])
    return x.view(jnp.dtype(type_name))


# Structures


def _steps_of(path: tuple[Any, ...]) -> list[str | int]:
    """A key path as strings for names and integers for places in a list."""
    return [
        key.idx if isinstance(key, SequenceKey) else _tree.path_string((key,))
        for key in path
    ]


def _nested(paths: list[list[str | int]], leaves: list[Array]) -> PyTree:
    """Builds dictionaries and lists from the steps of each path."""
    if paths == [[]]:
        return leaves[0]
    children: dict[str | int, Saved] = {}
    for (first, *rest), leaf in zip(paths, leaves, strict=True):
        child = children.setdefault(first, Saved([], []))
        child.paths.append(rest)
        child.leaves.append(leaf)
    made = {name: _nested(*child) for name, child in children.items()}
    is_list = all(isinstance(name, int) for name in made)
    return list(made.values()) if is_list else made
