"""The policy that is saved beside a checkpoint's arrays, and checked on reading.

Arrays alone do not show under which policy they were trained, and a run that goes on
under another one by mistake looks fine for a long time.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from jaxmp import _tree
from jaxmp.errors import CheckpointPolicyMismatch, InvalidCheckpoint
from jaxmp.loss_scale.state import LossScaleState
from jaxmp.policy import Policy, get_policy

T = TypeVar("T")

POLICY_KEY = "policy"


def check_checkpoint_policy(
    saved: Any, policy: Policy | str, *, convert: bool = False
) -> bool:
    """Compares the policy saved in a checkpoint with the one it is read under.

    Args:
      saved: a mapping with the saved policy under `"policy"`.
      policy: the policy to go on with.
      convert: True lets them differ.

    Returns:
      Whether they are the same.

    Raises:
      CheckpointPolicyMismatch: if they differ and `convert` is False.
      InvalidCheckpoint: if `saved` names no policy.

    Example:
      >>> from jaxmp.training._checkpoint_policy import check_checkpoint_policy
      >>> check_checkpoint_policy({"policy": "p=full,c=f16,o=full"}, "mixed_float16")
      True
    """
    if not isinstance(saved, Mapping) or POLICY_KEY not in saved:
        keys = sorted(saved) if isinstance(saved, Mapping) else type(saved).__name__
        raise InvalidCheckpoint(
            f"The checkpoint names no policy (found: {keys}). Save it with "
            f"{POLICY_KEY!r}: str(policy) beside the arrays, as jaxmp.TrainState does."
        )
    written, read = get_policy(str(saved[POLICY_KEY])), get_policy(policy)
    if written != read and not convert:
        raise CheckpointPolicyMismatch(
            f"The checkpoint was written under the policy {str(written)!r} and is read "
            f"under {str(read)!r}. Restore it under the former, or switch deliberately "
            "with convert=True, which casts its arrays and restarts the loss scale."
        )
    return written == read


def convert_like(restored: T, fresh: T) -> T:
    """Casts restored arrays to the dtypes of a fresh state of another policy.

    Args:
      restored: pytree of arrays, as saved.
      fresh: pytree of the same structure, as created under the new policy.

    Returns:
      The values of `restored` in the dtypes of `fresh`. Loss scales start as in
      `fresh`; the counts of applied and skipped steps go on.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.training import convert_like
      >>> convert_like(jnp.ones(2), jnp.zeros(2, jnp.bfloat16)).dtype
      dtype(bfloat16)
    """

    def is_scale(x: Any) -> bool:
        return isinstance(x, LossScaleState)

    def convert(old: Any, new: Any) -> Any:
        if not is_scale(new):
            return _tree.like(old, new)
        return old._replace(
            inner_state=convert_like(old.inner_state, new.inner_state),
            loss_scale=new.loss_scale,
            good_steps=new.good_steps,
            hysteresis_left=new.hysteresis_left,
        )

    return jax.tree.map(convert, restored, fresh, is_leaf=is_scale)
