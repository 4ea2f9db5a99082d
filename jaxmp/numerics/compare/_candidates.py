"""`Candidate`: a function under one of the policies that are compared."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import NumericsError
from jaxmp.numerics.compare._stand_in import stand_in, stand_in_rules
from jaxmp.numerics.ranges._formats import format_range
from jaxmp.numerics.replay._program import Program
from jaxmp.policy import Policy, PolicyLike, get_policy

Read: TypeAlias = Callable[..., Program]
"""`read_program`, with the function and its arguments given."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The programs that `compare` runs for one policy.

    Attributes:
      policy: as it was given, or as `str` writes it.
      dtype: its compute dtype.
      forward: the function.
      backward: the function with its gradient, if it returns a loss.
      range: the same in bfloat16, to find loss scales; None if it needs no scale.
    """

    policy: str
    dtype: np.dtype
    forward: Program
    backward: Program
    range: Program | None


def read_candidates(policies: Any, rules: Sequence[Any], read: Read) -> list[Candidate]:
    """Traces a function under each policy.

    Args:
      policies: a policy, or a sequence of them: what `get_policy` takes.
      rules: of `autocast`, for every policy.
      read: reads the function.

    Raises:
      NumericsError: if there is no policy.
      PolicyError: for a policy that cannot be read.
    """
    is_one = isinstance(policies, str) or not isinstance(policies, Sequence)
    specs: list[PolicyLike] = [policies] if is_one else list(policies)  # type: ignore
    if not specs:
        raise NumericsError(
            "policies=[] compares nothing. Write policies=['bfloat16', 'float16']."
        )
    named = {
        spec if isinstance(spec, str) else str(get_policy(spec)): get_policy(spec)
        for spec in specs
    }
    return [_candidate(name, policy, rules, read) for name, policy in named.items()]


def _candidate(
    name: str, policy: Policy, rules: Sequence[Any], read: Read
) -> Candidate:
    dtype = jnp.dtype(policy.compute_dtype)
    backward = read(policy=policy, rules=rules)
    range_ = None
    if backward.loss_scale is not None and not format_range(dtype).has_range_of_float32:
        range_ = read(policy=stand_in(policy), rules=stand_in_rules(rules))
    return Candidate(
        policy=name,
        dtype=dtype,
        forward=read(policy=policy, rules=rules, backward=False),
        backward=backward,
        range=range_,
    )
