"""`max_batch_size`: the largest batch that fits into a target's memory, by search."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmp.errors import BatchSearchError
from jaxmp.report._compile_step import compile_step_of
from jaxmp.report._rows import Row


class BatchSearch(NamedTuple):
    """What a search for the largest batch found.

    Attributes:
      batch: the largest batch that fits; 0 if not even the smallest does.
      peak: bytes that it needs; None for 0.
      memory: bytes of memory that a device of the target has.
      tried: every batch that was compiled, and whether it fits.
    """

    batch: int
    peak: int | None
    memory: int
    tried: dict[int, bool]


def max_batch_size(
    step_of_batch: Callable[[int], tuple[Any, ...]],
    *,
    target: str,
    multiple_of: int = 1,
    limit: int = 2**20,
    tolerance: float = 0.01,
    donate_argnums: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    cache: bool = True,
) -> BatchSearch:
    """Finds the largest batch with which a step fits into a target's memory.

    Memory grows with the batch almost in a straight line. The search compiles two
    batches, tries the third where the line through them meets the memory, and closes
    the gap from there. The memory is that of the compiled program; a framework's own
    reserve comes on top.

    Args:
      step_of_batch: takes a batch size and returns `(step, *args)`.
      target: a name of `targets()` whose memory is known.
      multiple_of: the batch is a multiple of it.
      limit: the largest batch that is tried.
      tolerance: the search ends once the smallest batch that does not fit is at most
        this share larger than the largest that does; with 0 it finds the exact batch.
      donate_argnums: as for `compile_step`.
      compiler_options: as for `compile_step`.
      cache: as for `compile_step`.

    Returns:
      A `BatchSearch`.

    Raises:
      BatchSearchError: if the limits leave no batch to try, or the memory of the target
        is unknown.
      The same errors as `compile_step`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmp.report import has_target, max_batch_size
      >>> def step_of_batch(batch):
      ...     return jnp.tanh, jax.ShapeDtypeStruct((batch, 2**30), jnp.float32)
      >>> if has_target("h100"):
      ...     assert max_batch_size(step_of_batch, target="h100").batch == 9
    """
    if not 1 <= multiple_of <= limit:
        raise BatchSearchError(
            f"No batch is a multiple of multiple_of={multiple_of} and at most "
            f"limit={limit}. Choose multiple_of of at least 1, and a limit that is not "
            "smaller."
        )
    rows: dict[int, Row] = {}

    def fits(count: int) -> bool:
        if count not in rows:
            report = compile_step_of(
                lambda _: step_of_batch(count * multiple_of),
                policies=["as it is"],
                targets=[target],
                donate_argnums=donate_argnums,
                compiler_options=compiler_options,
                cache=cache,
            )
            rows[count] = report.rows[0]
        return bool(rows[count].fits)

    good, bad, last = 0, None, limit // multiple_of
    guess = 1
    while bad is None or bad - good > max(1, tolerance * good):
        if fits(guess):
            good = guess
        else:
            bad = guess
        if rows[guess].memory is None:
            raise BatchSearchError(
                f"The memory of {target!r} is unknown, so no batch can be too large. "
                "Search on a target such as 'h100' or 'tpu-v5e'."
            )
        if good >= last:
            break
        guess = _next_guess(rows, good, bad, last)
    return BatchSearch(
        batch=good * multiple_of,
        peak=rows[good].peak if good else None,
        memory=rows[1].memory or 0,
        tried={n * multiple_of: bool(row.fits) for n, row in sorted(rows.items())},
    )


def _next_guess(rows: dict[int, Row], good: int, bad: int | None, last: int) -> int:
    """Where the line through two batches meets the memory, or twice as far."""
    known = sorted((n, row.peak) for n, row in rows.items() if row.peak is not None)
    most = last if bad is None else bad - 1
    if len(known) < 2:
        return min(max(2 * good, 1), most) if bad is None else max((good + bad) // 2, 1)
    (n0, peak0), (n1, peak1) = known[-2:]
    slope = (peak1 - peak0) / (n1 - n0)
    memory = rows[1].memory or 0
    if slope <= 0:
        return most if bad is None else (good + bad) // 2
    met = int(n0 + (memory - peak0) / slope)
    if bad is not None and (met <= good or met >= bad):
        # The line has led astray once: halve what is left.
        met = good + 1 if met <= good and bad - good > 2 else (good + bad) // 2
    return min(max(met, good + 1), most)
