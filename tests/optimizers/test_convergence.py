"""Training ends where float32 ends: three seeds of a language model, in half an hour.

Runs `examples/benchmarks/convergence.py`, whose table stands in the documentation.
"""

import convergence
import numpy as np
import pytest

pytestmark = pytest.mark.slow

KEPT = [
    "master_weights",
    "split master_weights",
    "split master_weights(cast_state)",
    "stochastic_rounding(cast_state)",
]


@pytest.fixture(scope="module")
def final_losses():
    return {name: final for name, (_, final) in convergence.run_all().items()}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_small_updates_ends_within_the_spread_of_float32(final_losses, name):
    full = final_losses["float32"]
    assert full.min() <= np.mean(final_losses[name]) <= full.max()
    spread = full.max() - full.min()
    assert np.abs(final_losses[name] - full).max() < spread


def test_the_control_is_visibly_worse(final_losses):
    control = final_losses["plain bfloat16 (control)"]
    full = final_losses["float32"]
    assert np.mean(control) > full.max()
    for name in KEPT:
        assert (control - full).min() > 2 * np.abs(final_losses[name] - full).max()
