"""`TrainState`: Flax's, with a policy, a loss scale and skipped steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import serialization, struct
from flax.training import train_state

from jaxmp._jaxpr.flax_internals import OVERWRITE_WITH_GRADIENT
from jaxmp._transformations import composition
from jaxmp.errors import InvalidCheckpoint
from jaxmp.loss_scale import select_applied, value_and_grad
from jaxmp.optimizers import check_master_weights
from jaxmp.policy import Policy, PolicyLike
from jaxmp.training._checkpoint_policy import (
    POLICY_KEY,
    check_checkpoint_policy,
    convert_like,
)
from jaxmp.training._create import (
    has_fp8_metadata,
    read_policy,
    split_options,
    trained_part,
    with_loss_scale,
)


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with a policy and a loss scale.

    Attributes:
      step: int32 scalar array; counts applied updates. For the number of batches, add
        the skipped ones of `jaxmp.loss_scale_metrics`.
      apply_fn: usually `model.apply`.
      params: pytree of parameters.
      tx: Optax transformation with a loss scale.
      opt_state: its state.
      policy: the `Policy`; static, and saved by name with the arrays.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp, optax
      >>> state = jaxmp.TrainState.create(
      ...     apply_fn=None,
      ...     params=jnp.ones(()),
      ...     tx=optax.sgd(0.1),
      ...     policy="mixed_float16",
      ... )
      >>> loss, grads = state.value_and_grad(lambda w: w**2)(state.params)
      >>> state = state.apply_gradients(grads=grads, value=loss)
      >>> float(state.params), int(state.step)
      (0.800000011920929, 1)
    """

    policy: Policy = struct.field(pytree_node=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _save_policy_with(cls)

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Any,
        params: Any,
        tx: optax.GradientTransformation,
        policy: PolicyLike,
        **kwargs: Any,
    ) -> "TrainState":
        """Creates a state at step 0.

        Args:
          apply_fn: usually `model.apply`.
          params: pytree of parameters, kept as they are.
          tx: an Optax transformation. It becomes `loss_scaling(tx, policy)` unless its
            state already has a loss scale.
          policy: what `get_policy` takes.
          **kwargs: fields of a subclass, and options of `loss_scaling`: `init_scale`,
            `growth_interval`, `axis_name`, ...

        Returns:
          A `TrainState`.

        Raises:
          PolicyError: for a policy that cannot be read.
          LossScalePolicyMismatch: if `tx` has the loss scale of a policy that needs
            another one.
          TrainStateOptionError: for a keyword that is neither a field nor an option,
            and for an option if `tx` already has a loss scale.
          LossScaleOptionError: for an option out of range.

        Example:
          >>> import jax.numpy as jnp, jaxmp, optax
          >>> state = jaxmp.TrainState.create(
          ...     apply_fn=None, params=jnp.ones(2), tx=optax.sgd(1.0), policy="float32"
          ... )
        """
        policy = read_policy(policy)
        fields, options = split_options(cls, kwargs)
        trained = trained_part(params)
        tx = with_loss_scale(tx, trained, policy, options)
        return cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            opt_state=tx.init(trained),
            policy=policy,
            **fields,
        )

    def value_and_grad(
        self, loss_fn: Callable[..., Any], **kwargs: Any
    ) -> Callable[..., Any]:
        """Returns `jaxmp.value_and_grad(loss_fn)` under this state's loss scale.

        Args:
          loss_fn: function of `(params, ...)` that returns the loss.
          **kwargs: keywords of `jaxmp.value_and_grad`: `has_aux`, `argnums`, ...

        Returns:
          A function of the arguments of `loss_fn`. Make a new one from every state.

        Example:
          >>> import jax.numpy as jnp, jaxmp, optax
          >>> state = jaxmp.TrainState.create(
          ...     apply_fn=None,
          ...     params=jnp.ones(()),
          ...     tx=optax.sgd(1.0),
          ...     policy="float32",
          ... )
          >>> loss, grads = state.value_and_grad(lambda w: 3 * w)(state.params)
          >>> float(loss), float(grads)
          (3.0, 3.0)
        """
        differentiated = value_and_grad(loss_fn, **kwargs)
        return functools.partial(differentiated, loss_scale=self.opt_state)

    def apply_gradients(
        self, *, grads: Any, value: Any = None, **kwargs: Any
    ) -> "TrainState":
        """Updates the parameters, or skips the step if a gradient is non-finite.

        Args:
          grads: true gradients, as `value_and_grad` returns them.
          value: the loss, which tells a collapse of the forward pass from an overflow.
          **kwargs: new values of other fields, such as `batch_stats`. A skipped step
            keeps the old ones; use `replace` for a field that has to move anyway.

        Returns:
          The next state.

        Raises:
          GradientTreeMismatch: if `grads` and `params` differ in structure.

        Example:
          >>> import jax.numpy as jnp, jaxmp, optax
          >>> state = jaxmp.TrainState.create(
          ...     apply_fn=None,
          ...     params=jnp.ones(()),
          ...     tx=optax.sgd(1.0),
          ...     policy="float32",
          ... )
          >>> state = state.apply_gradients(grads=jnp.float32(jnp.inf))
          >>> float(state.params), int(state.step)
          (1.0, 0)
        """
        has_metadata = has_fp8_metadata(grads)
        params = self.params["params"] if has_metadata else self.params
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            trained_part(grads),
            self.opt_state,
            params,
            **({} if value is None else {"value": value}),
        )
        moved = optax.apply_updates(params, updates)
        if composition.decides_on_nonfinite(opt_state):
            params = moved  # a bad micro-batch may end a good window
        else:  # a select, since the skipped update, -0.0, may flush a subnormal
            params = select_applied(opt_state, moved, params)
        if has_metadata:
            metadata = select_applied(
                opt_state,
                grads[OVERWRITE_WITH_GRADIENT],
                self.params[OVERWRITE_WITH_GRADIENT],
            )
            params = {"params": params, OVERWRITE_WITH_GRADIENT: metadata}
        others = {
            name: select_applied(opt_state, new, getattr(self, name))
            for name, new in kwargs.items()
        }
        step = select_applied(opt_state, self.step + 1, self.step)
        return self.replace(step=step, params=params, opt_state=opt_state, **others)


def restore(state: TrainState, saved: Any, *, convert: bool = False) -> TrainState:
    """Puts saved values into a train state of the same structure.

    Args:
      state: a freshly created state, with the structure and dtypes of the result.
      saved: result of `flax.serialization.to_state_dict(state)` or of
        `flax.serialization.msgpack_restore`.
      convert: True accepts a checkpoint of another policy: parameters and moments are
        cast to the dtypes of `state`, and the loss scale starts as in `state`.

    Returns:
      `state` with the saved arrays.

    Raises:
      CheckpointPolicyMismatch: if the policies differ and `convert` is False.
      InvalidCheckpoint: if `saved` names no policy.
      MasterWeightsMismatch: if parameters and master weights are from different steps.

    Example:
      >>> import flax, jax.numpy as jnp, jaxmp, optax
      >>> from jaxmp.training import restore
      >>> make = lambda policy: jaxmp.TrainState.create(
      ...     apply_fn=None, params=jnp.ones(2), tx=optax.adam(0.1), policy=policy
      ... )
      >>> saved = flax.serialization.to_state_dict(make("mixed_float16"))
      >>> state = restore(make("mixed_bfloat16"), saved, convert=True)
      >>> float(jaxmp.get_loss_scale(state))
      1.0
    """
    same = check_checkpoint_policy(saved, state.policy, convert=convert)
    restored = _from_state_dict(state, {**saved, POLICY_KEY: str(state.policy)})
    return restored if same else convert_like(restored, state)


def _to_state_dict(state: TrainState) -> dict[str, Any]:
    arrays = {
        name: serialization.to_state_dict(getattr(state, name))
        for name in _array_fields(state)
    }
    return {**arrays, POLICY_KEY: str(state.policy)}


def _from_state_dict(state: TrainState, saved: dict[str, Any]) -> TrainState:
    check_checkpoint_policy(saved, state.policy)
    names = _array_fields(state)
    if unmatched := set(names) ^ (set(saved) - {POLICY_KEY}):
        raise InvalidCheckpoint(
            f"The checkpoint has the fields {sorted(saved)}, and the "
            f"{type(state).__name__} has {sorted(names)}; {sorted(unmatched)} are on "
            "one side only. Restore into a state of the class that was saved."
        )
    restored = state.replace(
        **{
            name: serialization.from_state_dict(
                getattr(state, name), saved[name], name=name
            )
            for name in names
        }
    )
    if "master_weights" in composition.names(restored.opt_state):
        check_master_weights(restored.opt_state, trained_part(restored.params))
    return restored


def _array_fields(state: TrainState) -> list[str]:
    fields = dataclasses.fields(state)
    return [field.name for field in fields if field.metadata.get("pytree_node", True)]


def _save_policy_with(cls: type[TrainState]) -> None:
    serialization.register_serialization_state(
        cls, _to_state_dict, _from_state_dict, override=True
    )


_save_policy_with(TrainState)
