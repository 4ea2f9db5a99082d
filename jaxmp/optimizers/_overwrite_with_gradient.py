"""`overwrite_with_gradient`: the scales of Flax's float8 layers in an Optax loop.

    tx = loss_scaling(overwrite_with_gradient(optax.adamw(1e-3)), policy)

Flax's float8 layers keep scales and histories of magnitudes in a collection beside the
parameters. What JAX returns as their gradient is their new value. Flax's `TrainState`
knows that; an optimizer would train them.

Sharp edges
- The update of such a leaf is an object that stands for its new value, with two arrays
  inside, and not an array. `p + u`, `optax.apply_updates` and `nnx.Optimizer` take it;
  what scales or clips updates has to stand inside, and raises outside. So has
  `optax.MultiSteps`, which would average new values in silence outside.
- A history may hold an infinity while all gradients are finite, because float8 clips.
  The step is applied, as Flax does; Flax's next scale leaves the infinity out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp import _tree
from jaxmp._jaxpr.flax_internals import OVERWRITE_WITH_GRADIENT
from jaxmp._jaxpr.fp8_metadata import overwritten
from jaxmp._transformations import composition
from jaxmp._transformations.wrapping import (
    LOSS_SCALING_OUTERMOST,
    OWN_COLLECTION,
    pinned,
    strong_state,
    with_extra_args,
)
from jaxmp._tree import PyTree
from jaxmp.errors import OptimizerOptionError
from jaxmp.optimizers._replacement import Replacement

_REPAIRS = {"loss_scaling": LOSS_SCALING_OUTERMOST}


class OverwriteWithGradientState(NamedTuple):
    """State of `overwrite_with_gradient`."""

    inner_state: optax.OptState
    """State of the inner optimizer; it has nothing for what is overwritten."""

    transformation = "overwrite_with_gradient"
    forwards_decision = True


class OwnCollectionState(OverwriteWithGradientState):
    """The same, for a collection that only this transformation knows."""

    transformation = OWN_COLLECTION


def overwrite_with_gradient(
    inner: optax.GradientTransformation, collection: str = OVERWRITE_WITH_GRADIENT
) -> optax.GradientTransformationExtraArgs:
    """Gives the scales of float8 layers their new values, and optimizes the rest.

    The gradient of a leaf in the collection is its new value, which
    `optax.apply_updates` puts in place bit for bit. All other leaves are updated by
    `inner`. A tree without such leaves is updated by `inner` alone.

    Args:
      inner: any Optax transformation. It sees `optax.MaskedNode` in place of what is
        overwritten, and keeps no state for it.
      collection: the key under which these leaves stand, anywhere in the parameters.
        With the default, they are also found in nnx models that hold linen layers.
        Another collection works without `loss_scaling` and without `accumulate`
        around it, which know Flax's.

    Returns:
      An `optax.GradientTransformationExtraArgs`. The updates of overwritten leaves are
      objects that are added to the parameter alone. If `accumulate` stands inside, a
      non-finite micro-batch leaves these leaves as they were.

    Raises:
      OptimizerOptionError: from `init`, if nothing stands under a `collection` of your
        own.
      TransformationOrder: from `init`, if `inner` contains a loss scale; from
        `optax.apply_updates`, if a transformation around this one scaled or clipped.

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022
      (https://arxiv.org/abs/2209.05433); the collection is that of
      `flax/linen/fp8_ops.py`.

    Example:
      >>> import jax.numpy as jnp, jaxmp, optax
      >>> params = {
      ...     "params": {"w": jnp.float32(1)},
      ...     "_overwrite_with_gradient": {"scale": jnp.float32(1)},
      ... }
      >>> grads = {
      ...     "params": {"w": jnp.float32(1)},
      ...     "_overwrite_with_gradient": {"scale": jnp.float32(0.001)},
      ... }
      >>> tx = jaxmp.overwrite_with_gradient(optax.sgd(0.5))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)
      >>> print(new["params"]["w"], new["_overwrite_with_gradient"]["scale"])
      0.5 0.001
    """
    inner = with_extra_args(inner)
    is_flax = collection == OVERWRITE_WITH_GRADIENT
    state_class = OverwriteWithGradientState if is_flax else OwnCollectionState

    def init_fn(params: optax.Params) -> OverwriteWithGradientState:
        if not is_flax:
            _check_there_is(collection, params)
        inner_state = strong_state(inner.init(_hide(params, collection)))
        composition.refuse_inside("overwrite_with_gradient", inner_state, _REPAIRS)
        return state_class(inner_state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grads_finite: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OverwriteWithGradientState]:
        composition.require_state(state, state_class, "overwrite_with_gradient")
        trained = _hide(updates, collection)
        replaces = jnp.bool_(True)
        if composition.decides_on_nonfinite(state.inner_state):
            if grads_finite is None:
                grads_finite = _tree.all_finite(trained)
            replaces = grads_finite
        if grads_finite is not None:
            extra_args["grads_finite"] = grads_finite
        moves, inner_state = inner.update(
            trained, state.inner_state, _hide(params, collection), **extra_args
        )
        inner_state = pinned(inner_state, state.inner_state)
        merged = _merged(moves, updates, collection, replaces)
        return merged, state_class(inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _hide(tree: PyTree, collection: str) -> PyTree:
    """Puts a MaskedNode in place of what is overwritten, as optax.masked does."""
    leaves, structure = jax.tree.flatten(tree)
    hidden = [
        optax.MaskedNode() if is_hidden else x
        for x, is_hidden in zip(leaves, overwritten(tree, collection), strict=True)
    ]
    return jax.tree.unflatten(structure, hidden)


def _merged(
    moves: PyTree, new_values: PyTree, collection: str, replaces: jax.Array
) -> PyTree:
    """The updates of the inner optimizer, and new values where it saw nothing."""
    leaves, structure = jax.tree.flatten(new_values)
    is_new = overwritten(new_values, collection)
    moves = structure.flatten_up_to(moves)
    merged = [
        Replacement(x, replaces) if is_value else move
        for move, x, is_value in zip(moves, leaves, is_new, strict=True)
    ]
    return jax.tree.unflatten(structure, merged)


def _check_there_is(collection: str, params: PyTree) -> None:
    leaves = jax.tree.leaves(params)
    if leaves and not any(overwritten(params, collection)):
        raise OptimizerOptionError(
            f"collection={collection!r}: no parameter stands under this key, and every "
            "one would be trained. Initialise the optimizer with all variables, "
            "tx.init({'params': ..., 'name_of_the_collection': ...})."
        )
