"""Regions: where the code of users' layers runs, and how Flax's layers appear there.

The outermost layer of the user's opens a *region*: its code, and the code of all layers
inside, is traced and planned as `autocast` would plan it. The plan leaves a layer of
Flax inside alone, since the policy has already decided it, and shows its half result
to the code around as float32, as it would be without a policy. So a scan finds the
carry type that it started with, a constant such as 1 - 1e-6 is not rounded, and the
plan decides where the value is read in half and where in float32.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import ConcretizationTypeError, TracerArrayConversionError

from jaxmp import _tree
from jaxmp._jaxpr.marks import FULL_PRECISION_SCOPE, LAYER_SCOPE
from jaxmp.casting.kernels.half_operands import as_written
from jaxmp.casting.local import region_settings
from jaxmp.casting.plan.plan import Settings
from jaxmp.modules._layers import Application, LayerDtypes
from jaxmp.policy.rule_sets import half_blocks_in

_dtype: contextvars.ContextVar[np.dtype | None] = contextvars.ContextVar(
    "dtype of the region", default=None
)


def region_dtype() -> np.dtype | None:
    """The compute dtype of the code that runs now; None outside every region."""
    return _dtype.get()


def opens_region(dtype: np.dtype) -> bool:
    """Whether a layer with this compute dtype opens a region for its code."""
    return dtype in _tree.HALF and _dtype.get() != dtype


_is_planned: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "whether a plan follows", default=False
)


def is_planned() -> bool:
    """Whether the code that runs now is traced to be planned, in whatever way."""
    return _is_planned.get()


def own_code_settings(application: Application, dtypes: LayerDtypes) -> Settings | None:
    """What the plan of a layer's own code depends on; None if it is not in half."""
    if dtypes.compute not in _tree.HALF:
        return None
    return region_settings(
        dtypes.compute,
        dtypes.precision,
        application.has_wide_gradients,
        quantize=application.policy.quantize,
        half_blocks=half_blocks_in(application.rules),
    )


def as_written_settings(application: Application) -> Settings:
    """What the plan of code depends on that stays as it was traced.

    It gives weights their gradients in float32, and matmuls a smaller format.
    """
    return region_settings(
        application.half_dtype,
        wide_gradients=application.has_wide_gradients,
        as_written=True,
        quantize=application.policy.quantize,
        half_blocks=half_blocks_in(application.rules),
    )


@contextlib.contextmanager
def kept_as_written() -> Iterator[None]:
    """Marks code that is planned, and stays as it was traced but for its matmuls."""
    token = _is_planned.set(True)
    try:
        yield
    finally:
        _is_planned.reset(token)


@contextlib.contextmanager
def inside_region(dtype: np.dtype) -> Iterator[None]:
    """Marks the code that runs as planned with a compute dtype."""
    token = _dtype.set(dtype)
    try:
        with kept_as_written():
            yield
    finally:
        _dtype.reset(token)


@contextlib.contextmanager
def region(dtype: np.dtype) -> Iterator[None]:
    """Enters a region; errors of tracing say how to do without one."""
    with inside_region(dtype):
        try:
            yield
        except _NEEDS_VALUES as error:
            if _HINT not in getattr(error, "__notes__", ()):
                error.add_note(_HINT)
            raise


_NEEDS_VALUES = (ConcretizationTypeError, TracerArrayConversionError)
_HINT = (
    "apply_policy() traces the code of your layers to plan it, as jax.jit does. Code "
    "that needs the values of arrays runs outside jax.jit with "
    "apply_policy(model, policy, own_code='half')."
)


@contextlib.contextmanager
def in_float32(dtype: np.dtype) -> Iterator[None]:
    """Keeps the code that runs in float32, as it was written."""
    with inside_region(dtype), jax.named_scope(FULL_PRECISION_SCOPE), as_written():
        yield


@contextlib.contextmanager
def as_decided() -> Iterator[None]:
    """Marks a layer of Flax, which the plan around leaves alone."""
    if _dtype.get() is None:
        yield
        return
    token = _dtype.set(None)
    try:
        with jax.named_scope(LAYER_SCOPE), as_written():
            yield
    finally:
        _dtype.reset(token)


def has_half(tree: Any) -> bool:
    """Whether a tree holds an array in half."""
    return any(
        _tree.is_array(x) and jnp.result_type(x) in _tree.HALF
        for x in jax.tree.leaves(tree)
    )
