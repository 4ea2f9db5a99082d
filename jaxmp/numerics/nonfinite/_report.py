"""`NonfiniteReport`: what `find_nonfinite` found, in plain words."""

import dataclasses
from typing import Any, Literal

from jaxmp._views import html
from jaxmp._views.numbers import power
from jaxmp._views.result import Result
from jaxmp.numerics.nonfinite._origin import Operand


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonfiniteReport(Result):
    """Where the first NaN or infinity came from. False if nothing was found.

    Attributes:
      kind: `"finite"`: nothing found; `"handled overflow"`: only gradients are not
        finite, and a lower loss scale mends it; `"divergence"`: no scale helps.
      what: `"NaN"` or `"Inf"`.
      primitive: the operation, such as `"exp"`; `"input"` if an argument holds it,
        `"constant"` if the program does.
      path: name scopes and modules around it.
      file, line, function: the user's source line.
      is_backward: whether it is part of a backward pass, the function's own included.
      in_gradient: whether only gradients show it.
      iterations: numbers of the iterations of the loops around it, outermost first.
      operands: the ranges of what it was given.
      result: the range of what it made.
      cause: what happened.
      repair: what to write instead.
      float32_helps: whether float32 was tried there and mended it; None if it was not
        tried. `repair` says it in words.
      reached: what is not finite in the end.
      loss_scale: the scale that was used, None without gradients.
      finite_at_scale: the largest power of two below it at which all gradients are
        finite; None if no such scale exists, or none was looked for.
    """

    kind: Literal["finite", "handled overflow", "divergence"] = "finite"
    what: str | None = None
    primitive: str | None = None
    path: str = ""
    file: str | None = None
    line: int | None = None
    function: str | None = None
    is_backward: bool = False
    in_gradient: bool = False
    iterations: tuple[int, ...] = ()
    operands: tuple[Operand, ...] = ()
    result: Operand | None = None
    cause: str = ""
    repair: str = ""
    float32_helps: bool | None = None
    reached: tuple[str, ...] = ()
    loss_scale: float | None = None
    finite_at_scale: float | None = None

    def __bool__(self) -> bool:
        return self.kind != "finite"

    def to_rows(self) -> list[dict[str, Any]]:
        """Gives what was found as one row; no row if everything is finite."""
        names = [field.name for field in dataclasses.fields(self)]
        row = {name: _as_cell(getattr(self, name)) for name in names}
        return [row] if self else []

    def _contents(self) -> "NonfiniteReport":
        return self

    def _page(self) -> str:
        return html.page("What is not finite", html.preformatted(str(self)))

    def __str__(self) -> str:
        if not self:
            scale = (
                f" at loss scale {power(self.loss_scale)}" if self.loss_scale else ""
            )
            return f"Everything that comes out is finite{scale}."
        lines = [self._headline(), ""]
        lines += [f"  where     {self._where()}"]
        if self.iterations:
            numbers = ", ".join(map(str, self.iterations))
            inside = " (outermost loop first)" if len(self.iterations) > 1 else ""
            lines += [f"  iteration {numbers}{inside}"]
        lines += [f"  operand   {operand}" for operand in self.operands]
        if self.result is not None:
            lines += [f"  result    {self.result}"]
        shown = ", ".join(self.reached[:3])
        more = len(self.reached) - 3
        lines += [f"  reaches   {shown}{f' and {more} more' if more > 0 else ''}"]
        return "\n".join([*lines, "", f"{self.cause}.", self.repair]).rstrip()

    def _where(self) -> str:
        way = "backward" if self.is_backward else "forward"
        line = f"{self.file}:{self.line}, in {self.function}" if self.file else ""
        return ", ".join(part for part in (self.path, line, way) if part)

    def _headline(self) -> str:
        first = f"first {self.what} made by {self.primitive}"
        if self.primitive in ("input", "constant"):
            first = f"{self.what} in {self.primitive}"
        if self.kind == "divergence" and self.in_gradient:
            return f"Divergence, {first}: gradients are not finite at any loss scale."
        if self.kind == "divergence":
            return f"Divergence, {first}: no loss scale helps."
        low = (
            "; below 1, so give dynamic_loss_scaling a lower min_scale"
            if self.finite_at_scale is not None and self.finite_at_scale < 1
            else ", and dynamic loss scaling will get there"
        )
        return (
            f"Handled overflow, {first}: the gradients are finite at loss scale "
            f"{power(self.finite_at_scale)}{low}."
        )


def _as_cell(value: Any) -> Any:
    if isinstance(value, tuple) and not isinstance(value, Operand):
        return "; ".join(map(str, value))
    return str(value) if isinstance(value, Operand) else value
