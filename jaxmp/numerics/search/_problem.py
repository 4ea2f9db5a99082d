"""`Problem`: evaluates sets of units that are kept, within a budget."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence

from jaxmp.errors import MissingPackage, NumericsError
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.search._evaluation import Evaluation, Measured, flop_shares
from jaxmp.numerics.search._saved import Saved
from jaxmp.numerics.search._units import Unit


class BudgetSpent(Exception):
    """Another evaluation would be one too many."""


class Problem:
    """Evaluates sets of units, each of them once.

    Args:
      programs: a function of the kept units that returns the program of each batch.
      exact: the same programs in float32.
      saved: what was evaluated so far.
      budget: how many evaluations there may be, with those that are saved.
      advance: called after each new one.

    Raises:
      NumericsError: if a program is not finite in float32.
    """

    def __init__(
        self,
        programs: Callable[[tuple[Unit, ...]], list[Program]],
        exact: Sequence[Program],
        saved: Saved,
        budget: int,
        advance: Callable[[], object],
    ):
        self.programs = programs
        self.references = [Measured(program) for program in exact]
        for i, reference in enumerate(self.references):
            if not reference.is_finite:
                raise NumericsError(
                    f"The loss or a gradient of batch {i} is not finite in float32, so "
                    "there is nothing to compare half precision with. "
                    "jaxmp.numerics.find_nonfinite(loss_fn, *batch) says why."
                )
        self.saved = saved
        self.budget = budget
        self.advance = advance
        self._met: set[frozenset[str]] = set()

    def evaluate(self, kept: Sequence[Unit]) -> Evaluation:
        """What loss and gradients are with these units kept in float32, or in half.

        Raises:
          BudgetSpent: if that would be one evaluation too many.
        """
        names = frozenset(unit.name for unit in kept)
        if names not in self._met:
            if len(self._met) >= self.budget:
                raise BudgetSpent
            if names not in self.saved.evaluations:
                self.saved.add(self._measure(kept))
            self._met.add(names)
            self.advance()
        return self.saved.evaluations[names]

    def _measure(self, kept: Sequence[Unit]) -> Evaluation:
        programs = self.programs(tuple(kept))
        errors = [
            Measured(program).errors(reference)
            for program, reference in zip(programs, self.references, strict=True)
        ]
        losses, gradients = zip(*errors, strict=True)
        shares = flop_shares(programs[0].jaxpr)
        return Evaluation(
            kept=tuple(unit.name for unit in kept),
            loss_error=max(losses),
            gradient_error=max(gradients),
            half_flops=shares.half,
            quantized_flops=shares.quantized,
        )


@contextlib.contextmanager
def progress_bar(shown: bool | None, total: int) -> Iterator[Callable[[], object]]:
    """Opens a progress bar, and yields a function that advances it by one.

    Args:
      shown: None shows it in a terminal, if tqdm is installed.
      total: where it ends.

    Raises:
      MissingPackage: if `shown` is True and tqdm is not installed.
    """
    if shown is None:
        shown = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    if not shown:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "progress=True needs tqdm, which is not installed. Run: pip install tqdm"
        ) from error
    with tqdm(total=total, desc="search_policy", unit="set", leave=False) as bar:
        yield lambda: bar.update(1)
