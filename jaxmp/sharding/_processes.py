"""`check_same_policy`: one policy in all processes of a run."""

import hashlib

import jax
import numpy as np

from jaxmp.errors import ProcessPolicyMismatch
from jaxmp.policy import PolicyLike, get_policy

_BYTES_OF_TEXT = 256


def check_same_policy(policy: PolicyLike) -> None:
    """Raises in every process unless all have the same policy.

    Call it once, in every process, after `jax.distributed.initialize`. Processes with
    different policies compile different steps: these wait for each other for ever, or
    read each other's bytes in another dtype. `"auto"` reads as the policy of the
    process's own device, so machines of two kinds may differ.

    Nothing else calls it: all processes have to take part, and a train state may be
    made in one of them alone.

    Args:
      policy: what `get_policy` takes.

    Raises:
      ProcessPolicyMismatch: in every process, naming the policies of all.
      PolicyError: for a policy that cannot be read.

    Example:
      >>> from jaxmp.sharding import check_same_policy
      >>> check_same_policy("mixed_bfloat16")
    """
    text = str(get_policy(policy))
    if jax.process_count() == 1:
        return
    texts = _of_all_processes(text)
    if len(set(texts)) > 1:
        shown = "; ".join(f"process {i}: {text!r}" for i, (text, _) in enumerate(texts))
        raise ProcessPolicyMismatch(
            f"The processes of this run have different policies. {shown}. Start all "
            "with the same one; name it instead of 'auto' where devices differ."
        )


def _of_all_processes(text: str) -> list[tuple[str, bytes]]:
    """Gathers a text of every process: its beginning, and a digest of all of it."""
    from jax.experimental import multihost_utils

    encoded = text.encode()
    beginning = encoded[:_BYTES_OF_TEXT].ljust(_BYTES_OF_TEXT, b"\0")
    row = np.frombuffer(beginning + hashlib.sha256(encoded).digest(), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [
        (row[:_BYTES_OF_TEXT].rstrip(b"\0").decode(errors="replace"), row)
        for row in (row.astype(np.uint8).tobytes() for row in rows)
    ]
