"""States from elsewhere: restored by other libraries, or trained without a scale."""

import math
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import _tree
from jaxmp._transformations import composition
from jaxmp.errors import (
    CheckpointPolicyMismatch,
    MissingLossScale,
    TrainStateOptionError,
)
from jaxmp.loss_scale import loss_scaling
from jaxmp.loss_scale.made_with import notes
from jaxmp.loss_scale.state import LossScaleState, find, first_state
from jaxmp.loss_scale.state_machines import DynamicMachine, Machine
from jaxmp.optimizers import check_dtypes, check_master_weights
from jaxmp.policy import Policy, PolicyLike
from jaxmp.training._create import read_policy, split_options, trained_part
from jaxmp.training._train_state import TrainState

T = TypeVar("T", bound=TrainState)


def check_restored(state: Any, *, tx: Any = None, params: Any = None) -> None:
    """Raises on the host if a restored state was trained under another kind of policy.

    Call it on a state that your own Orbax `CheckpointManager` or another library has
    restored. Arrays do not show under which policy they were written, and a bfloat16
    run at a scale of 65536 or a float16 run at 1 looks fine for a long time.

    Args:
      state: a `TrainState`, or an optimizer state.
      tx: the optimizer; a `TrainState` has one.
      params: the parameters; a `TrainState` has them. Without them, dtypes are not
        compared.

    Raises:
      CheckpointPolicyMismatch: if this optimizer cannot have this loss scale.
      DtypeMismatch: if the optimizer would keep arrays in other dtypes.
      MasterWeightsMismatch: if parameters and master weights are from different steps.
      MissingLossScale: if there is none.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.training import check_restored
      >>> state = jaxmp.TrainState.create(
      ...     apply_fn=None, params=jnp.ones(2), tx=optax.sgd(0.1), policy="float32"
      ... )
      >>> check_restored(state)
      >>> other = state.opt_state._replace(loss_scale=jnp.float32(65536))
      >>> check_restored(state.replace(opt_state=other))
      Traceback (most recent call last):
      ...
      jaxmp.errors.CheckpointPolicyMismatch: The restored loss scale is 65536, ...
    """
    policy = ""
    if isinstance(state, TrainState):
        policy = f" under the policy {str(state.policy)!r}"
        state, tx, params = state.opt_state, state.tx, state.params
        params = trained_part(params)
    if tx is None:
        raise MissingLossScale(
            "An optimizer state does not show what it should be. Pass its optimizer: "
            "check_restored(opt_state, tx=tx, params=params)."
        )
    scale = find(state)
    for made_with in notes(tx):
        if isinstance(scale, LossScaleState):
            _check_scale(scale, made_with.machine, policy)
    if params is None:
        return
    shapes = jax.eval_shape(tx.init, params)
    if jax.tree.structure(shapes) == jax.tree.structure(state):
        check_dtypes(state, shapes)
    if "master_weights" in composition.names(state):
        check_master_weights(state, params)


def _check_scale(state: LossScaleState, machine: Machine, policy: str) -> None:
    scale = float(np.asarray(state.loss_scale))
    if isinstance(machine, DynamicMachine):
        wrong = not _may_be_dynamic(state, machine)
        wanted = f"a dynamic one that started from {machine.init_scale:g}"
    else:
        wrong = scale != machine.scale
        wanted = f"the constant {machine.scale:g}"
    if wrong:
        raise CheckpointPolicyMismatch(
            f"The restored loss scale is {scale:g}, and this optimizer's is {wanted}: "
            f"the checkpoint was written under another policy than it is read{policy}. "
            "Restore it under its own, or switch deliberately: "
            "jaxmp.training.convert_like(restored, fresh) casts its arrays and "
            "restarts the loss scale."
        )


def _may_be_dynamic(state: LossScaleState, machine: DynamicMachine) -> bool:
    """Whether a dynamic scale can have reached this value."""
    scale, good, left, skipped = (
        float(np.asarray(x))
        for x in (
            state.loss_scale,
            state.good_steps,
            state.hysteresis_left,
            state.skipped_steps,
        )
    )
    if left == 0 and (skipped == 0 or (bool(state.grads_finite) and good == 0)):
        return False  # hysteresis starts above zero, and every finite step counts
    if not machine.min_scale <= scale <= machine.max_scale:
        return False
    down = math.log2(machine.init_scale / scale) / -math.log2(machine.backoff_factor)
    return down <= skipped


@overload
def adopt(state: Any, policy: optax.GradientTransformation) -> LossScaleState: ...


@overload
def adopt(
    state: Any, policy: PolicyLike, *, cls: type[T] = TrainState, **kwargs: Any
) -> T: ...


def adopt(state: Any, policy: Any, *, cls: type = TrainState, **kwargs: Any) -> Any:
    """Continues a run that had no loss scale, bit for bit.

    Args:
      state: a `flax.training.train_state.TrainState`, or anything with its `step`,
        `apply_fn`, `params`, `tx` and `opt_state`; or the state of an Optax optimizer.
      policy: what `get_policy` takes; for the state of an optimizer, what is to update
        it from now on: `loss_scaling(optimizer, policy)`.
      cls: the class of the result for a train state.
      **kwargs: as for `TrainState.create`: fields of `cls`, options of `loss_scaling`.

    Returns:
      A `TrainState` with the parameters, moments and step of the old one, and a fresh
      loss scale; or a state of `loss_scaling`, whose counts of steps start at zero.

    Raises:
      TrainStateOptionError: if the optimizer already has a loss scale, or for a keyword
        that is neither a field nor an option.
      MissingLossScale: if the state of an optimizer comes without `loss_scaling`.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> from flax.training import train_state
      >>> from jaxmp.training import adopt
      >>> old = train_state.TrainState.create(
      ...     apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.adam(0.1)
      ... )
      >>> old = old.apply_gradients(grads={"w": jnp.ones(2)})
      >>> new = adopt(old, "mixed_float16")
      >>> int(new.step), float(jaxmp.get_loss_scale(new))
      (1, 65536.0)
      >>> tx = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")
      >>> opt_state = adopt(old.opt_state, tx)
      >>> int(opt_state.inner_state[0].count)
      1
    """
    old = getattr(state, "opt_state", state)
    if "loss_scaling" in composition.names(old):
        raise TrainStateOptionError(
            "The optimizer of this state already has a loss scale. Create a new state "
            "with it, TrainState.create(tx=state.tx, ...), and restore into that."
        )
    inner_state = jax.tree.map(_tree.strong, old)
    if not hasattr(state, "opt_state"):
        return first_state(inner_state, _machine_of(policy).init())
    policy = read_policy(policy)
    fields, options = split_options(cls, kwargs)
    tx = loss_scaling(state.tx, policy, **options)
    step = jnp.asarray(state.step, jnp.int32)
    # Not tx.init: two optimizer states at once may not fit into memory.
    opt_state = first_state(inner_state, _machine_of(tx).init())
    return cls(
        step=step,
        apply_fn=state.apply_fn,
        params=state.params,
        tx=tx,
        opt_state=opt_state._replace(applied_steps=step),
        policy=policy,
        **fields,
    )


def _machine_of(tx: Any) -> Machine:
    """How the scale moves of a transformation that has it outermost."""
    made_with = getattr(getattr(tx, "init", None), "made_with", None)
    if made_with is None:
        given = repr(tx) if isinstance(tx, (str, Policy)) else type(tx).__name__
        raise MissingLossScale(
            f"The state of an optimizer was given with {given}. Pass the optimizer "
            "that goes on with it, its loss scale outermost: "
            "adopt(opt_state, loss_scaling(optimizer, policy))."
        )
    return made_with.machine
