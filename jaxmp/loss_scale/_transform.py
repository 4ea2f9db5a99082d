"""`loss_scaling`: an Optax transformation that skips non-finite steps.

It takes true gradients, as `jaxmp.value_and_grad` returns them, and stands outermost:

    tx = loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), adamw), policy)

On a finite step the inner transformation runs and counts. On any other step nothing
moves: parameters, the whole inner state and the count of its schedule stay
bit-identical (see below for NaN parameters), and a dynamic scale backs off.

One inner transformation handles non-finite steps itself: `accumulate` drops a bad
micro-batch and goes on with its window, which that very micro-batch may end. Where a
state says so (`decides_on_nonfinite`, see `jaxmp/_transformations/composition.py`),
nothing is selected here. Every transformation that takes `grads_finite=` gets it, and
whatever stands in between sees a gradient of zero in place of the bad one. `init`
refuses state beside `accumulate`, which would move on that zero.

Only gradients that the inner transformation looks at are checked: those of a frozen
part reach nothing and cost no step (`jaxmp/loss_scale/_used_gradients.py`). FP8
metadata is no gradient: a history with an infinity in it would skip every step to come.

Sharp edges
- The skip is a select behind the inner update, and XLA fuses the two. A `lax.cond`
  around the inner update would double the step's memory traffic: its branches are
  compiled apart, and every array is copied at their border.
- A skipped update is -0.0, not 0.0: p + 0.0 turns a parameter -0.0 into +0.0, while
  p + (-0.0) is p. There are two exceptions: some machines flush a subnormal p to zero
  in every addition, and NVIDIA's GPUs give a NaN the payload of their own NaN. It stays
  a NaN. `TrainState` selects, and keeps both.
- `jax_debug_nans` raises on the first NaN that a compiled function returns, so it
  aborts on an overflow that would be skipped, unless the whole step is one function
  that returns neither gradients nor updates. Leave it off, and read `grads_finite`.
- Inside a transformation with a state of its own (`MultiSteps`, `lookahead`), the skip
  protects only what it wraps. That is why it stands outermost.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp import _tree
from jaxmp._jaxpr.axes import AxisName, bound_size
from jaxmp._transformations import composition
from jaxmp._transformations.wrapping import (
    OWN_COLLECTION,
    float32_view,
    pinned,
    strong_state,
    with_extra_args,
)
from jaxmp.loss_scale._checks import (
    check_same_tree,
    refuse_averaged_scales,
    warn_about_fp8_metadata,
    warn_about_half_params,
)
from jaxmp.loss_scale._unscaled_gradients import warn_if_unscaled
from jaxmp.loss_scale._used_gradients import UsedGradients
from jaxmp.loss_scale.made_with import MadeWith, note, read_made_with
from jaxmp.loss_scale.state import (
    LOSS_UNKNOWN,
    LossScaleState,
    find_all,
    first_state,
    multiple_loss_scales,
)
from jaxmp.loss_scale.state_machines import (
    DynamicMachine,
    Scale,
    StaticMachine,
)
from jaxmp.loss_scale.unscale import unscale_tree

_REPAIRS = {
    OWN_COLLECTION: (
        "value_and_grad knows Flax's collection alone, and would divide another one by "
        "the loss scale. Keep the metadata under '_overwrite_with_gradient'."
    ),
}


def loss_scaling(
    inner: optax.GradientTransformation,
    policy_or_scale: Any,
    *,
    skip_nonfinite: bool = True,
    grads_are_scaled: bool = False,
    axis_name: AxisName | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer with the loss scale that a policy needs.

    A policy with float16 in it gets a dynamic scale. bfloat16 and float32 have the same
    range, so they get the scale 1. Non-finite steps are skipped in every mode: changing
    the policy changes the scale and nothing else.

    Args:
      inner: any Optax transformation; this one goes outermost around it.
      policy_or_scale: what `get_policy` takes, or a number for a static scale, or a
        jmp-style `LossScale` to start from.
      skip_nonfinite: False applies every update. If the scale is 1 or static, the
        gradients are then not checked at all.
      grads_are_scaled: True if `update` gets gradients of `scale_loss(loss, state)` and
        has to unscale them; False for gradients of `jaxmp.value_and_grad`.
      axis_name: mesh axes whose devices decide together, for `shard_map` and `pmap`.
        Sharded arrays under `jit` need nothing.
      **options: options of `dynamic_loss_scaling`. They override those of a
        `DynamicLossScale`, and are not used if the scale is not dynamic.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `LossScaleState`. Its
      `update(grads, state, params, value=loss)` remembers whether the loss was finite.

    Raises:
      LossScaleOptionError: for an option out of range, in every mode.
      PolicyError: for a policy that cannot be read.
      MultipleLossScales: from `init`, if `inner` already has a loss scale.
      GradientTreeMismatch: from `update`, if gradients and parameters differ.
      UnknownAxis: from `update`, if nothing binds `axis_name` there.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018, section 3.2
      (https://arxiv.org/abs/1710.03740).

    Example:
      >>> import jax, jax.numpy as jnp, jaxmp, optax
      >>> tx = jaxmp.loss_scaling(optax.adam(1e-3), "mixed_float16")
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2)
      >>> loss, grads = jaxmp.value_and_grad(loss_fn)(params, loss_scale=state)
      >>> updates, state = tx.update(grads, state, params, value=loss)
      >>> params = optax.apply_updates(params, updates)
      >>> int(state.applied_steps), float(state.loss_scale)
      (1, 65536.0)
    """
    made_with = read_made_with(policy_or_scale, options)
    return _transformation(
        inner, made_with, skip_nonfinite, grads_are_scaled, axis_name
    )


def dynamic_loss_scaling(
    inner: optax.GradientTransformation,
    *,
    init_scale: float = 2.0**16,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
    hysteresis: int = 1,
    axis_name: AxisName | None = None,
    skip_nonfinite: bool = True,
    grads_are_scaled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer with a loss scale that adapts to the gradients.

    The scale is multiplied by `growth_factor` on exactly the `growth_interval`-th
    finite step in a row, and by `backoff_factor` on a non-finite one.

    Args:
      inner: any Optax transformation; this one goes outermost around it.
      init_scale: first scale. Scales and factors are powers of two, so that scaling
        and unscaling are exact.
      growth_interval: finite steps in a row before the scale grows.
      growth_factor: factor of the scale when it grows; above 1.
      backoff_factor: factor of the scale when it backs off; below 1.
      min_scale: lowest scale; may be below 1.
      max_scale: highest scale.
      hysteresis: non-finite steps before the scale backs off; refilled on growth.
      axis_name: as in `loss_scaling`.
      skip_nonfinite: as in `loss_scaling`.
      grads_are_scaled: as in `loss_scaling`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `LossScaleState`.

    Raises:
      LossScaleOptionError: for an option out of range.

    References:
      Defaults and growth as in `torch.amp.GradScaler` (torch/amp/grad_scaler.py), the
      largest scale as in NVIDIA Apex (apex/amp/scaler.py), hysteresis as in Megatron-LM
      (megatron/core/optimizer/grad_scaler.py).

    Example:
      >>> import jaxmp, optax
      >>> tx = jaxmp.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2.0**15)
    """
    machine = DynamicMachine(
        init_scale=init_scale,
        growth_interval=growth_interval,
        growth_factor=growth_factor,
        backoff_factor=backoff_factor,
        min_scale=min_scale,
        max_scale=max_scale,
        hysteresis=hysteresis,
    )
    return _transformation(
        inner, MadeWith(None, machine), skip_nonfinite, grads_are_scaled, axis_name
    )


def static_loss_scaling(
    inner: optax.GradientTransformation,
    scale: float,
    *,
    axis_name: AxisName | None = None,
    skip_nonfinite: bool = True,
    grads_are_scaled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer with a loss scale that never changes.

    Args:
      inner: any Optax transformation; this one goes outermost around it.
      scale: a power of two.
      axis_name: as in `loss_scaling`.
      skip_nonfinite: as in `loss_scaling`.
      grads_are_scaled: as in `loss_scaling`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `LossScaleState`.

    Raises:
      LossScaleOptionError: if the scale is not a power of two.

    Example:
      >>> import jaxmp, optax
      >>> tx = jaxmp.static_loss_scaling(optax.sgd(0.1), 1024)
    """
    made_with = MadeWith(None, StaticMachine(scale))
    return _transformation(
        inner, made_with, skip_nonfinite, grads_are_scaled, axis_name
    )


def _transformation(
    inner: Any,
    made_with: MadeWith,
    skip_nonfinite: bool,
    grads_are_scaled: bool,
    axis_name: AxisName | None,
) -> optax.GradientTransformationExtraArgs:
    inner = with_extra_args(inner)
    machine = made_with.machine
    used = UsedGradients()
    looks_at_gradients = skip_nonfinite or isinstance(machine, DynamicMachine)

    def init_fn(params: optax.Params) -> LossScaleState:
        inner_state = strong_state(inner.init(params))
        others = find_all(inner_state)
        if others:
            raise multiple_loss_scales(1 + len(others))
        composition.refuse_inside("loss_scaling", inner_state, _REPAIRS)
        composition.refuse_beside_decision(inner_state)
        refuse_averaged_scales(inner_state)
        if not composition.lands_on_half(inner_state):
            warn_about_half_params(params)
        return first_state(inner_state, machine.init())

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LossScaleState]:
        composition.require_state(state, LossScaleState, "loss_scaling")
        check_same_tree(updates, params)
        warn_about_fp8_metadata(updates, state.inner_state)
        if isinstance(machine, DynamicMachine):
            warn_if_unscaled(updates, state.loss_scale, by_hand=grads_are_scaled)
        if grads_are_scaled:
            grads = unscale_tree(updates, state.loss_scale)
        else:
            grads = float32_view(updates)
        if value is not None:
            extra_args["value"] = value
        finite = jnp.bool_(True)
        if looks_at_gradients:
            update = functools.partial(_update, inner, finite)
            looked_at = used(update, grads, state.inner_state, params, extra_args)
            finite = _agree(_tree.all_finite(looked_at), axis_name)
        decides = composition.decides_on_nonfinite(state.inner_state)
        if decides:
            grads = _or_nothing(finite, grads)
        updates, inner_state = _update(
            inner, finite, grads, state.inner_state, params, extra_args
        )
        inner_state = pinned(inner_state, state.inner_state)
        if skip_nonfinite and not decides:
            updates = _or_nothing(finite, updates)
            inner_state = composition.select(finite, inner_state, state.inner_state)
        applied = finite if skip_nonfinite else jnp.bool_(True)
        scale = machine.next(_scale_of(state), finite)
        new_state = _next_state(state, inner_state, scale, finite, applied)
        return updates, new_state._replace(loss_finite=_loss_finite(value, axis_name))

    return optax.GradientTransformationExtraArgs(note(init_fn, made_with), update_fn)


def _or_nothing(finite: jax.Array, updates: optax.Updates) -> optax.Updates:
    """Returns the updates, or ones that change no bit of a parameter."""
    nothing = jax.tree.map(_tree.negative_zero, updates)
    return _tree.select(finite, updates, nothing)


def _next_state(
    state: LossScaleState,
    inner_state: optax.OptState,
    scale: Scale,
    finite: jax.Array,
    applied: jax.Array,
) -> LossScaleState:
    skipped = (~applied).astype(jnp.int32)
    return state._replace(
        inner_state=inner_state,
        **scale._asdict(),
        grads_finite=finite,
        applied_steps=state.applied_steps + applied.astype(jnp.int32),
        skipped_steps=state.skipped_steps + skipped,
        consecutive_skips=(state.consecutive_skips + skipped) * skipped,
    )


def _update(
    inner: optax.GradientTransformationExtraArgs,
    finite: jax.Array,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """Runs the inner update, and passes `grads_finite=` on unless it is refused.

    A signature cannot show that: `optax.chain` takes any argument and passes it to line
    searches, which refuse what their `value_fn` does not take.
    """
    try:
        return inner.update(grads, state, params, grads_finite=finite, **extra_args)
    except TypeError as error:
        if "grads_finite" not in str(error):
            raise
        return inner.update(grads, state, params, **extra_args)


def _scale_of(state: LossScaleState) -> Scale:
    return Scale(state.loss_scale, state.good_steps, state.hysteresis_left)


_LEAVE_OUT = (
    "Update inside jax.shard_map or jax.pmap over this axis. Under jit with sharded "
    "arrays leave axis_name out: there is one decision already."
)


def _agree(finite: jax.Array, axis_name: AxisName | None) -> jax.Array:
    if axis_name is None:
        return finite
    bound_size(axis_name, "loss_scaling(..., axis_name=...)", _LEAVE_OUT)
    return jax.lax.pmin(finite.astype(jnp.int32), axis_name).astype(jnp.bool_)


def _loss_finite(value: Any, axis_name: AxisName | None) -> jax.Array:
    if value is None:
        return jnp.full((), LOSS_UNKNOWN, jnp.int32)
    return _agree(jnp.all(jnp.isfinite(value)), axis_name).astype(jnp.int32)
