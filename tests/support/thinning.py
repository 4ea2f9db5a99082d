"""Which combinations a default run tries; the slow tests try them all."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def every_second(
    names: str, *axes: Iterable[Any], ids: Callable[[Any], str] = str
) -> pytest.MarkDecorator:
    """Parametrizes by combinations, every second of which is slow.

    As on a chessboard: a value of one axis still meets every second of the others. Of
    one axis alone, every second value is run.

    Args:
      names: of the parameters, separated by spaces, one for each axis.
      *axes: the values of each.
      ids: what tests call a value.
    """
    params = []
    for places in itertools.product(*map(enumerate, axes)):
        is_slow = sum(index for index, _ in places) % 2
        values = [value for _, value in places]
        marks = [pytest.mark.slow] * is_slow
        params.append(pytest.param(*values, marks=marks, id="-".join(map(ids, values))))
    return pytest.mark.parametrize(names.split(), params)
