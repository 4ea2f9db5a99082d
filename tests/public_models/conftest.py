"""Public code promotes ranks without a word, as JAX lets it."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def ranks_are_promoted() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield
