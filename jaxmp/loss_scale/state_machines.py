"""How a loss scale moves: not at all, or with the gradients.

A machine is static data: options of Python numbers, validated once. It makes the first
`Scale` and, on every step, the next one from the last one and a boolean.
"""

import dataclasses
import difflib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp.errors import LossScaleOptionError

# A scale and its reciprocal are normal float32 numbers, so that scaling by it and back
# is exact. 2^-126 is the smallest normal number, and the reciprocal of 2^126.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126
LARGEST_COUNT = 2**31 - 1


class Scale(NamedTuple):
    """A loss scale and the counters that decide when it moves."""

    loss_scale: jax.Array
    """float32 scalar, a power of two."""
    good_steps: jax.Array
    """int32 scalar: finite steps in a row since the scale last moved."""
    hysteresis_left: jax.Array
    """int32 scalar: non-finite steps left before the scale backs off."""


def next_scale(
    scale: Scale,
    finite: jax.Array,
    *,
    growth_interval: int,
    growth_factor: float,
    backoff_factor: float,
    min_scale: float,
    max_scale: float,
    hysteresis: int,
) -> Scale:
    """Moves a dynamic scale by one step.

    The scale grows on exactly the `growth_interval`-th finite step in a row, as in
    `torch.amp.GradScaler`, and never leaves `[min_scale, max_scale]`. Hysteresis is
    Megatron-LM's (`core/optimizer/grad_scaler.py`): every non-finite step uses up one
    of `hysteresis`, the scale backs off once none is left, and growth refills them.
    """
    loss_scale, good_steps, hysteresis_left = scale
    good_steps = jnp.where(finite, good_steps + 1, 0)
    grows = good_steps >= growth_interval
    hysteresis_left = jnp.where(
        finite, hysteresis_left, jnp.maximum(hysteresis_left - 1, 0)
    )
    grown = jnp.minimum(loss_scale * jnp.float32(growth_factor), max_scale)
    backed_off = jnp.maximum(loss_scale / jnp.float32(1 / backoff_factor), min_scale)
    on_finite = jnp.where(grows & jnp.isfinite(grown), grown, loss_scale)
    on_nonfinite = jnp.where(hysteresis_left == 0, backed_off, loss_scale)
    return Scale(
        loss_scale=jnp.where(finite, on_finite, on_nonfinite),
        good_steps=jnp.where(grows, 0, good_steps),
        hysteresis_left=jnp.where(grows, hysteresis, hysteresis_left),
    )


@dataclasses.dataclass(frozen=True)
class StaticMachine:
    """A scale that never changes; it is 1 for policies that need no scale."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_power_of_two("scale", self.scale)

    def init(self) -> Scale:
        """Starts at the scale."""
        return _start(self.scale, hysteresis=0)

    def next(self, scale: Scale, finite: jax.Array) -> Scale:
        """Returns the same scale."""
        del finite
        return scale


@dataclasses.dataclass(frozen=True)
class DynamicMachine:
    """A scale that doubles after enough good steps and halves on a bad one."""

    init_scale: float = 2.0**16
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    hysteresis: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_count = name in ("growth_interval", "hysteresis")
            check = check_count if is_count else check_power_of_two
            check(name, value)
        if self.growth_factor <= 1:
            raise LossScaleOptionError(
                f"growth_factor={self.growth_factor} would never let the loss scale "
                "grow. Use a power of two above 1, such as 2.0."
            )
        if self.backoff_factor >= 1:
            raise LossScaleOptionError(
                f"backoff_factor={self.backoff_factor} would never let the loss scale "
                "back off. Use a power of two below 1, such as 0.5."
            )
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise LossScaleOptionError(
                "The loss scale needs min_scale <= init_scale <= max_scale, not "
                f"min_scale={self.min_scale}, init_scale={self.init_scale}, "
                f"max_scale={self.max_scale}."
            )

    def init(self) -> Scale:
        """Starts at `init_scale`."""
        return _start(self.init_scale, self.hysteresis)

    def next(self, scale: Scale, finite: jax.Array) -> Scale:
        """Moves the scale by one step."""
        return next_scale(
            scale,
            finite,
            growth_interval=self.growth_interval,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            min_scale=self.min_scale,
            max_scale=self.max_scale,
            hysteresis=self.hysteresis,
        )


Machine = StaticMachine | DynamicMachine


def dynamic_machine(options: dict[str, Any]) -> DynamicMachine:
    """Builds a dynamic machine; an unknown option is an error that names it."""
    allowed = [field.name for field in dataclasses.fields(DynamicMachine)]
    for name in options:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise LossScaleOptionError(
                f"A loss scale has no option {name!r}.{hint} "
                f"Options: {', '.join(allowed)}."
            )
    return DynamicMachine(**options)


def _start(scale: float, hysteresis: int) -> Scale:
    return Scale(
        loss_scale=jnp.asarray(scale, jnp.float32),
        good_steps=jnp.zeros((), jnp.int32),
        hysteresis_left=jnp.asarray(hysteresis, jnp.int32),
    )


def check_power_of_two(name: str, value: Any) -> None:
    """Raises unless multiplying and dividing by `value` is exact."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise LossScaleOptionError(
            f"{name}={value!r} is not a number. Use a power of two, such as 2.0**16."
        )
    if not (SMALLEST_SCALE <= number <= LARGEST_SCALE):
        raise LossScaleOptionError(
            f"{name}={value!r} is outside [2**-126, 2**126], where a scale and its "
            "reciprocal are both normal float32 numbers. Use a power of two in between."
        )
    if math.frexp(number)[0] != 0.5:
        below = 2.0 ** (math.frexp(number)[1] - 1)
        raise LossScaleOptionError(
            f"{name}={value!r} is not a power of two, so scaling by it would round the "
            f"gradients. Use {below:g} or {2 * below:g}."
        )


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raises unless `value` is a number of steps that fits an int32 counter."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_integer or not at_least <= value <= LARGEST_COUNT:
        raise LossScaleOptionError(
            f"{name}={value!r} counts steps. Use a Python integer of at least "
            f"{at_least} and at most {LARGEST_COUNT}."
        )
