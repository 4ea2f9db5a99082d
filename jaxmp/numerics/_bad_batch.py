"""`record_bad_batch`: the last batch that was skipped, kept so that it can be replayed.

    bad = no_bad_batch(batch=batch, params=params)
    ...
    updates, new_state = tx.update(grads, state, params, value=loss)     # in the step
    bad = record_bad_batch(
        bad, new_state, batch=batch, params=params, loss_scale=state
    )
    ...
    bad.save("bad_batch.npz")                                            # on the host

A pure function: the record is an argument and a result of the step, and nobody waits
for anything. A skipped step leaves the parameters as they were, so that the parameters
before the step and the batch are all that it takes to see it again.

What it costs: the memory of one batch and one set of parameters. They are copied on a
bad step; on a good one, the TPU compiler moves nothing, and the one for the H100 copies
some of the parameters, so that the record may have them if it has to. Leave `params`
out where that is too much, and take them from a checkpoint.
"""

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
from jaxmp._jaxpr.execution import cond
from jaxmp.errors import NotOnHost, NumericsError
from jaxmp.loss_scale import get_loss_scale, loss_scale_metrics

PyTree = Any


class BadBatch(NamedTuple):
    """What it takes to run the last step with non-finite gradients again."""

    batch: PyTree
    """What the step was given."""
    params: PyTree
    """The parameters before the step, which are those after it if it was skipped."""
    loss_scale: jax.Array
    """float32: the scale that its gradients were computed with."""
    step: jax.Array
    """int32: which update it was, counted from 1; 0 if there was none."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record to one file, for `load_bad_batch`.

        Args:
          path: of the file; it is replaced.

        Raises:
          NumericsError: if no step was recorded.
          NotOnHost: if called in a compiled function.
        """
        try:
            step = int(np.asarray(self.step))
        except jax.errors.TracerArrayConversionError:
            raise NotOnHost(
                "BadBatch.save() writes a file and was called in a compiled function. "
                "Call it outside of jit, on the record that the step returned."
            ) from None
        if step == 0:
            raise NumericsError(
                "There is no bad batch to save: every step so far had finite "
                "gradients. Look at record.step, which is 0 until one had not."
            )
        leaves = jax.tree_util.tree_leaves_with_path(self)
        arrays = {str(i): _to_numpy(x) for i, (_, x) in enumerate(leaves)}
        index = [[_steps_of(path), _type_of(x)] for path, x in leaves]
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, index=json.dumps(index), **arrays)
        temporary.replace(path)


def no_bad_batch(*, batch: PyTree, params: PyTree = None) -> BadBatch:
    """Returns the record to start with.

    Args:
      batch: pytree of arrays like the batches to come; only its shapes matter.
      params: the same for the parameters; None to record batches alone.

    Returns:
      A `BadBatch` of zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import no_bad_batch
      >>> int(no_bad_batch(batch=jnp.ones((8, 3))).step)
      0
    """
    return BadBatch(
        batch=jax.tree.map(jnp.zeros_like, batch),
        params=jax.tree.map(jnp.zeros_like, params),
        loss_scale=jnp.zeros((), jnp.float32),
        step=jnp.zeros((), jnp.int32),
    )


def record_bad_batch(
    record: BadBatch,
    opt_state: Any,
    *,
    batch: PyTree,
    params: PyTree = None,
    loss_scale: Any,
) -> BadBatch:
    """Keeps this step if its gradients were not finite, and the record if they were.

    Args:
      record: from the step before; `no_bad_batch` before the first.
      opt_state: what `update` returned, or anything that contains one state of
        `loss_scaling`.
      batch: what the step was given.
      params: the parameters before the update.
      loss_scale: the scale that the gradients were computed with: the optimizer state
        before the update, or whatever else `get_loss_scale` takes.

    Returns:
      A `BadBatch` of the same shapes.

    Raises:
      NumericsError: if shapes differ from those of `record`.
      MissingLossScale: if `opt_state` or `loss_scale` holds none.
      MultipleLossScales: if one of them holds several.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.numerics import no_bad_batch, record_bad_batch
      >>> tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")
      >>> params, batch = jnp.ones(2), jnp.array([3.0, jnp.inf])
      >>> state = tx.init(params)
      >>> record = no_bad_batch(batch=batch, params=params)
      >>> _, new_state = tx.update(params * batch, state, params)
      >>> record = record_bad_batch(
      ...     record, new_state, batch=batch, params=params, loss_scale=state
      ... )
      >>> print(record.step, record.batch, record.loss_scale)
      1 [ 3. inf] 65536.0
    """
    metrics = loss_scale_metrics(opt_state)
    steps = metrics["applied_steps"] + metrics["skipped_steps"]
    scale = loss_scale
    if not (_tree.is_array(scale) or isinstance(scale, (int, float))):
        scale = get_loss_scale(scale)
    now = BadBatch(batch, params, jnp.asarray(scale, jnp.float32), steps)
    _check_shapes(record, now)
    now = jax.tree.map(_tree.like, now, record)
    return cond(metrics["grads_finite"], lambda: record, lambda: now)


def _check_shapes(record: BadBatch, now: BadBatch) -> None:
    for name in ("batch", "params"):
        kept, given = (jax.tree.map(np.shape, getattr(x, name)) for x in (record, now))
        if kept != given:
            raise NumericsError(
                f"The record was made for {name} of shape {kept}, and is given "
                f"{given}. Start with no_bad_batch(batch=batch, params=params) of what "
                "the steps are given, and leave params out of both or of none."
            )


def load_bad_batch(
    path: str | os.PathLike[str], *, batch: PyTree = None, params: PyTree = None
) -> BadBatch:
    """Reads what `BadBatch.save` wrote.

    Args:
      path: of the file.
      batch: a pytree of the structure that the batch had, such as another batch or
        `jax.eval_shape` of it. Without one, what was a dictionary or a list is one
        again, and anything else is a dictionary by the names of its fields.
      params: the same for the parameters.

    Returns:
      A `BadBatch` of NumPy arrays, bit by bit what was saved; keys are arrays of JAX.

    Raises:
      NumericsError: if the file is none of these, or the structures differ.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import BadBatch, load_bad_batch
      >>> params = {"w": jnp.ones(2)}
      >>> record = BadBatch(jnp.ones(3), params, jnp.float32(8), jnp.int32(5))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     record.save(os.path.join(folder, "bad.npz"))
      ...     loaded = load_bad_batch(os.path.join(folder, "bad.npz"))
      >>> loaded.params["w"].tolist(), int(loaded.step)
      ([1.0, 1.0], 5)
    """
    saved: dict[str, tuple[list[Any], list[Any]]]
    saved = {name: ([], []) for name in BadBatch._fields}
    try:
        with Path(path).open("rb") as opened, np.load(opened) as file:
            for i, (steps, type_name) in enumerate(json.loads(str(file["index"]))):
                paths, leaves = saved[steps[0]]
                paths.append(steps[1:])
                leaves.append(_from_numpy(file[str(i)], type_name))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise NumericsError(
            f"{os.fspath(path)!r} is no bad batch. Pass a file that "
            "BadBatch.save(path) wrote."
        ) from error
    return BadBatch(
        batch=_restored("batch", *saved["batch"], batch),
        params=_restored("params", *saved["params"], params),
        loss_scale=saved["loss_scale"][1][0],
        step=saved["step"][1][0],
    )


# Arrays


def _is_key(x: Any) -> bool:
    return _tree.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _type_of(x: Any) -> str:
    if _is_key(x):
        return f"key<{jax.random.key_impl(x)}>"
    return np.asarray(x).dtype.name


def _to_numpy(x: Any) -> np.ndarray:
    x = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    # NumPy's files know the bytes of bfloat16 and float8 numbers, but not their names.
    return x.view(f"u{x.dtype.itemsize}") if x.dtype.kind == "V" else x


def _from_numpy(x: np.ndarray, type_name: str) -> Any:
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


def _restored(
    name: str, paths: list[list[Any]], leaves: list[Any], like: PyTree
) -> PyTree:
    if like is None:
        return _nested(paths, leaves) if leaves else None
    shapes = [np.shape(x) for x in leaves]
    wanted = [np.shape(x) for x in jax.tree.leaves(like)]
    if shapes != wanted:
        raise NumericsError(
            f"The {name} in the file has arrays of the shapes {shapes}, and {name}= "
            f"has {wanted}. Pass one of the same structure, or none."
        )
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _nested(paths: list[list[Any]], leaves: list[Any]) -> PyTree:
    """Builds dictionaries and lists from the steps of each path."""
    if paths == [[]]:
        return leaves[0]
    children: dict[Any, tuple[list[Any], list[Any]]] = {}
    for (first, *rest), leaf in zip(paths, leaves, strict=True):
        of_child = children.setdefault(first, ([], []))
        of_child[0].append(rest)
        of_child[1].append(leaf)
    made = {name: _nested(*of_child) for name, of_child in children.items()}
    is_list = all(isinstance(name, int) for name in made)
    return list(made.values()) if is_list else made
