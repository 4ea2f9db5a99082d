"""Checkpoints with Orbax. The only file that imports it.

Orbax writes a checkpoint into a temporary folder and renames it once it is complete. A
checkpoint that was interrupted, by a signal or a power cut, is never read.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxmp import _tree
from jaxmp.errors import InvalidCheckpoint, PolicyError
from jaxmp.policy import Policy, PolicyLike, get_policy
from jaxmp.training._checkpoint_policy import (
    POLICY_KEY,
    check_checkpoint_policy,
    convert_like,
)
from jaxmp.training._mesh import check_mesh
from jaxmp.training._train_state import TrainState

T = TypeVar("T")

# The three items of a checkpoint, each a folder in it.
ARRAYS, NOTES = "arrays", "notes"


class Checkpoints:
    """A folder of Orbax checkpoints, each with its policy beside the arrays.

    All of a `TrainState` is saved: parameters, optimizer state, loss scale and
    counters, each in its dtype, so that a run goes on bit for bit.

    Args:
      directory: folder of this run; it is made if it does not exist.
      max_to_keep: number of checkpoints to keep; older ones are deleted.
      **options: further fields of `orbax.checkpoint.CheckpointManagerOptions`, such as
        `enable_async_checkpointing=True` to save in the background.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.training import Checkpoints
      >>> make = lambda: jaxmp.TrainState.create(
      ...     apply_fn=None,
      ...     params=jnp.ones(2),
      ...     tx=optax.adam(0.1),
      ...     policy="mixed_float16",
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder) as checkpoints:
      ...         checkpoints.save(10, make(), notes={"epoch": 2})
      ...         state = checkpoints.restore(make())
      ...         print(checkpoints.latest_step(), checkpoints.notes())
      10 {'epoch': 2}
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, max_to_keep: int = 3, **options: Any
    ) -> None:
        self.directory = Path(directory).resolve()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                **{"enable_async_checkpointing": False, **options},
            ),
            item_handlers={
                ARRAYS: ocp.StandardCheckpointHandler(),
                POLICY_KEY: ocp.JsonCheckpointHandler(),
                NOTES: ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        *,
        policy: PolicyLike | None = None,
        notes: Any = None,
    ) -> None:
        """Saves a state as the checkpoint of a step.

        Args:
          step: number of the checkpoint.
          state: a `TrainState`, or any pytree, such as `(model, nnx_optimizer)`.
          policy: policy under which the state is trained; a `TrainState` has its own.
          notes: anything that JSON can hold; `notes()` reads it.

        Raises:
          PolicyError: if `policy` is missing or cannot be read.
          orbax.checkpoint.checkpoint_manager.StepAlreadyExistsError: if this step
            already has a checkpoint.
        """
        policy = _policy_of(state, policy)
        items = {
            ARRAYS: ocp.args.StandardSave(_by_name(state)),
            POLICY_KEY: ocp.args.JsonSave({POLICY_KEY: str(policy)}),
            NOTES: ocp.args.JsonSave({NOTES: notes}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self,
        state: T,
        *,
        step: int | None = None,
        policy: PolicyLike | None = None,
        convert: bool = False,
    ) -> T:
        """Reads a checkpoint into the form of a freshly created state.

        Args:
          state: a state with the structure, dtypes and shardings of the result: arrays,
            or `jax.ShapeDtypeStruct` with a `sharding`. The mesh may be another than
            the one that the checkpoint was written on.
          step: step of the checkpoint; the newest by default.
          policy: policy to go on with; a `TrainState` has its own.
          convert: True accepts a checkpoint of another policy: parameters and moments
            are cast to the dtypes of `state`, and the loss scale starts as in `state`.

        Returns:
          `state` with the saved values.

        Raises:
          CheckpointPolicyMismatch: if the policies differ and `convert` is False.
          InvalidCheckpoint: if there is none, if it names no policy, or if its arrays
            have other names, shapes or dtypes than those of `state`.
          CheckpointMeshMismatch: if a sharding of `state` does not divide its array.
        """
        step = self._existing(step)
        same = check_checkpoint_policy(
            self._read(step, POLICY_KEY, ocp.args.JsonRestore()),
            _policy_of(state, policy),
            convert=convert,
        )
        named = _by_name(state)
        self._check_arrays(step, named, check_dtypes=same)
        check_mesh(named, f"Checkpoint {step} in {self.directory}")
        form = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
        arrays = self._read(step, ARRAYS, ocp.args.StandardRestore(form))
        leaves = [arrays[name] for name in named]
        restored = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return restored if same else convert_like(restored, state)

    def notes(self, *, step: int | None = None) -> Any:
        """Returns the notes saved with a checkpoint, the newest by default.

        Raises:
          InvalidCheckpoint: if there is no such checkpoint.
        """
        return self._read(self._existing(step), NOTES, ocp.args.JsonRestore())[NOTES]

    def close(self) -> None:
        """Waits until everything is written; a `with` block does it at its end."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _existing(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps or step not in (None, *steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint {step}"
            raise InvalidCheckpoint(
                f"There is {wanted} in {self.directory} (found: {steps or 'none'}). "
                "Pass the folder that the checkpoints were saved to."
            )
        return steps[-1] if step is None else step

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        try:
            composite = ocp.args.Composite(**{item: args})
            return self._manager.restore(step, args=composite)[item]
        except (KeyError, FileNotFoundError):
            found = sorted(path.name for path in (self.directory / str(step)).iterdir())
            raise InvalidCheckpoint(
                f"Checkpoint {step} in {self.directory} has no item {item!r} (found: "
                f"{found}). Save it with jaxmp.training.Checkpoints, or restore it "
                "with Orbax alone."
            ) from None

    def _check_arrays(
        self, step: int, named: dict[str, Any], *, check_dtypes: bool
    ) -> None:
        saved = self._manager.item_metadata(step)[ARRAYS]
        where = f"Checkpoint {step} in {self.directory}"
        for name in sorted(saved.keys() ^ named.keys()):
            side = "only saved" if name in saved else "not saved"
            raise InvalidCheckpoint(
                f"{where} is of another state: {name!r} was {side}. Restore into a "
                "state made with the same model and optimizer."
            )
        for name, new in named.items():
            if not _is_plain_array(new):
                continue
            old = saved[name]
            same_dtype = not check_dtypes or jnp.dtype(old.dtype) == new.dtype
            if tuple(old.shape) != new.shape or not same_dtype:
                raise InvalidCheckpoint(
                    f"{where} has {name!r} as {old.dtype}{list(old.shape)}, and the "
                    f"state has {new.dtype}{list(new.shape)}. Restore into a state "
                    "made with the same model and optimizer."
                )


def _policy_of(state: Any, policy: PolicyLike | None) -> Policy:
    if policy is not None:
        return get_policy(policy)
    if isinstance(state, TrainState):
        return state.policy
    raise PolicyError(
        f"A {type(state).__name__} has no policy. Pass the one that it is trained "
        "under: policy='mixed_float16'"
    )


def _is_plain_array(x: Any) -> bool:
    if not (_tree.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)):
        return False
    # Orbax describes a PRNG key by the integers inside it.
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _by_name(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_tree.path_string(path): leaf for path, leaf in leaves}
