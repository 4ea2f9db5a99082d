"""The rows of a `Comparison`: activations, matmuls, gradients and policies."""

import dataclasses
from collections.abc import Iterator

from jaxmp._jaxpr.sources import Source
from jaxmp._views.numbers import percent, power
from jaxmp.numerics.compare._quantized import QuantizedMatmuls, formats, usual_error

_INACCURATE = 0.1
_LOST = 0.001
# Errors that know nothing of each other grow with the root of their number.
_MATMULS_IN_A_ROW = 36
_UNUSUAL = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """How far an array is from the reference.

    Attributes:
      policy: as it was given, or as `str` writes it.
      relative_error: norm of the difference over norm of the reference; infinite if
        something came out that is not finite.
      cosine: of the angle between the two; NaN where one of them is zero.
      snr: signal-to-noise ratio in decibels: -20 log10 of the relative error.
      zeroed: which fraction of what is not zero came out as zero.
      nonfinite: how many numbers came out infinite or NaN, where the reference is not.
      size: how many numbers were compared.
      limit: the relative error above which it is called inaccurate: 10 %, or what 36
        matmuls in a row add in the format that they are multiplied in.
    """

    policy: str
    relative_error: float
    cosine: float
    snr: float
    zeroed: float
    nonfinite: int
    size: int
    limit: float

    def figures(self) -> tuple[str, ...]:
        """Its figures as text."""
        return (
            f"{self.relative_error:.2e}",
            f"{self.cosine:.6f}",
            f"{self.snr:.1f}",
            percent(self.zeroed),
            str(self.nonfinite or ""),
        )

    @property
    def badness(self) -> tuple[float, float]:
        """What rows are sorted by: the larger, the worse."""
        return self.relative_error, self.zeroed

    @property
    def kind(self) -> str:
        """`"nonfinite"`, `"inaccurate"` (above `limit`), `"underflow"` or `"fine"`."""
        if self.nonfinite:
            return "nonfinite"
        if self.relative_error > self.limit:
            return "inaccurate"
        return "underflow" if self.zeroed > _LOST else "fine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationRow(_Row):
    """What one operation of the forward pass gave, over all iterations of loops.

    A result that is cast at once is compared after the cast.

    Attributes:
      path: name scopes and modules around it.
      operation: name of the primitive.
      file, line, function: the user's source line.
      order: place in the order of execution.
      dtype: of the result under the policy.
    """

    path: str
    operation: str
    file: str
    line: int
    function: str
    order: int
    dtype: str

    @property
    def source(self) -> str:
        """The line, for people."""
        return Source(self.file, self.line, self.function).short * bool(self.file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulRow(_Row):
    """What a matmul in float8 or int8 adds to the error by itself, over all iterations.

    The reference is the product of its operands before they were rounded. Three times
    the usual error of its format is inaccurate: a few outliers have taken the range.

    Attributes:
      path: name scopes and modules around it.
      file, line, function: the user's source line.
      is_backward: whether it makes a gradient.
      formats: of its operands, such as `"float8_e4m3fn"`.
      usual: the relative error for normally distributed operands.
    """

    path: str
    file: str
    line: int
    function: str
    is_backward: bool
    formats: str
    usual: float

    @property
    def source(self) -> str:
        """The line, for people."""
        return Source(self.file, self.line, self.function).short * bool(self.file)


def matmul_rows(policy: str, matmuls: QuantizedMatmuls) -> Iterator[MatmulRow]:
    """A row for each quantised matmul that was measured under a policy."""
    for site, distance in matmuls.found.items():
        described = site.described()
        del described["operation"]
        usual = usual_error(site.eqn)
        yield MatmulRow(
            policy=policy,
            **described,
            is_backward=site.is_backward,
            formats=formats(site.eqn),
            usual=usual,
            limit=_UNUSUAL * usual,
            **distance.figures(),
        )


def tolerable(matmuls: QuantizedMatmuls) -> float:
    """The relative error above which activations or gradients are inaccurate.

    Args:
      matmuls: the quantised ones that they are computed with.
    """
    usual = max((usual_error(site.eqn) for site in matmuls.found), default=0.0)
    return max(_INACCURATE, _MATMULS_IN_A_ROW**0.5 * usual)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientRow(_Row):
    """The gradient of one parameter, after it was divided by the loss scale.

    Where a gradient is far smaller than the others, as for a bias before a norm, its
    error is relative to one per cent of a typical gradient.

    Attributes:
      parameter: its name, such as `"params['w']"`.
      zeroed_unscaled: what `zeroed` is at loss scale 1.
    """

    parameter: str
    zeroed_unscaled: float

    @property
    def kind(self) -> str:
        """As in `ActivationRow`; losses at scale 1 count as underflow, too."""
        kind = super().kind
        lost = self.zeroed_unscaled > _LOST
        return "underflow" if kind == "fine" and lost else kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRow:
    """What one policy does.

    Attributes:
      policy: as it was given, or as `str` writes it.
      dtype: its compute dtype.
      output_error: relative error of the outputs, all of them together.
      limit: the relative error above which these are called inaccurate.
      gradient_error: the worst relative error of a parameter's gradient; None without
        gradients, and so are the following.
      loss_scale: the scale that the gradients were computed at.
      largest_scale: the largest power of two at which nothing overflows in the backward
        pass; None for a dtype with the range of float32, and so are the following.
      smallest_scale: the smallest at which nothing becomes zero or subnormal; if it is
        above `largest_scale`, no scale keeps everything.
      lost_unscaled, lost_at_largest: which fraction of the backward pass becomes zero
        at scale 1 and at `largest_scale`.
    """

    policy: str
    dtype: str
    output_error: float
    limit: float
    gradient_error: float | None
    loss_scale: float | None
    largest_scale: float | None
    smallest_scale: float | None
    lost_unscaled: float | None
    lost_at_largest: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        wanted, given = self.gradient_error, self.lost_at_largest
        return (
            self.policy,
            f"{self.output_error:.2e}",
            "-" if wanted is None else f"{wanted:.2e}",
            *map(_scale, (self.loss_scale, self.smallest_scale, self.largest_scale)),
            *("-" if x is None else percent(x) for x in (self.lost_unscaled, given)),
        )


def _scale(scale: float | None) -> str:
    return "-" if scale is None else power(scale)
