"""`record_bad_batch`: the last batch that was skipped, kept so that it can be replayed.

    bad = no_bad_batch(batch=batch, params=params)
    ...
    updates, new_state = tx.update(grads, state, params, value=loss)     # in the step
    bad = record_bad_batch(
        bad, new_state, batch=batch, params=params, loss_scale=state
    )
    ...
    bad.save("bad_batch.npz")                                            # on the host

A pure function: the record is an argument and a result of the step, and nothing waits
for the host. A skipped step leaves the parameters as they were, so the parameters and
the batch are all it takes to see the step again.

What it costs: the memory of one batch and one set of parameters, and a copy of them on
a bad step. On a good one, the TPU compiler moves nothing, and the one for the H100
copies some of the parameters. Leave `params` out where that is too much, and take them
from a checkpoint.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import _tree
from jaxmp._jaxpr.execution import cond
from jaxmp._tree import PyTree
from jaxmp.errors import NotOnHost, NumericsError
from jaxmp.loss_scale import get_loss_scale, loss_scale_metrics
from jaxmp.numerics.monitor import _bad_batch_file
from jaxmp.numerics.monitor._processes import wait_for_all, whole_on_host


class BadBatch(NamedTuple):
    """What it takes to run the last step with non-finite gradients again."""

    batch: PyTree
    """What the step was given."""
    params: PyTree
    """The parameters before the step, and after it if it was skipped."""
    loss_scale: jax.Array
    """float32: the scale that its gradients were computed with."""
    step: jax.Array
    """int32: which update it was, counted from 1; 0 if there was none."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record to one file, for `load_bad_batch`.

        With several processes, all call it, and the first one writes: arrays that are
        divided over the devices of all are gathered, and the file is there for every
        process once this returns. Of an array that belongs to one process alone, the
        file holds the one of the first.

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
                "Call it outside jit, on the record that the step returned."
            ) from None
        if step == 0:
            raise NumericsError(
                "There is no bad batch to save: every step so far had finite "
                "gradients. record.step is 0 until one has not."
            )
        record = whole_on_host(self)
        if jax.process_index() == 0:
            _bad_batch_file.write(path, record)
        wait_for_all("jaxmp.numerics.BadBatch.save")


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
    """Keeps this step if its gradients were not finite; if they were, the old record.

    Args:
      record: from the step before; `no_bad_batch` before the first.
      opt_state: what `update` returned, or anything that contains one state of
        `loss_scaling`.
      batch: what the step was given.
      params: the parameters before the update.
      loss_scale: the scale that the gradients were computed with: the optimizer state
        before the update, or anything else that `get_loss_scale` takes.

    Returns:
      A `BadBatch` of the same shapes.

    Raises:
      NumericsError: if shapes differ from the record's.
      MissingLossScale: if `opt_state` or `loss_scale` holds no loss scale.
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
                "the steps are given, and leave params out of both or of neither."
            )


def load_bad_batch(
    path: str | os.PathLike[str], *, batch: PyTree = None, params: PyTree = None
) -> BadBatch:
    """Reads what `BadBatch.save` wrote.

    Args:
      path: of the file.
      batch: a pytree of the batch's structure, such as another batch or the
        `jax.eval_shape` of one. Without it, dictionaries and lists come back as they
        were, and anything else as a dictionary of its fields.
      params: the same for the parameters.

    Returns:
      A `BadBatch` of NumPy arrays, bit by bit what was saved; keys are arrays of JAX.

    Raises:
      NumericsError: if it is another file, or the structures differ.

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
    saved = _bad_batch_file.read(path, BadBatch._fields)
    return BadBatch(
        batch=saved["batch"].restored("batch", batch),
        params=saved["params"].restored("params", params),
        loss_scale=saved["loss_scale"].leaves[0],
        step=saved["step"].leaves[0],
    )
