"""The benchmark of the update step: all four contestants do the same work."""

import pathlib
import runpy

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


def test_the_four_scalers_train_alike():
    benchmark = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "update_step.py"))
    seconds, losses = benchmark["measure"](width=16, depth=2, batch=4, rounds=3)
    assert seconds.shape == (4, 3)
    assert np.all(seconds > 0)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
