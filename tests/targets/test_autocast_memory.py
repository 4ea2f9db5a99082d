"""GPT-2 small and ResNet-50 in plain float32 Flax under autocast, on the H100 and v5e.

For GPT-2 this runs `examples/benchmarks/autocast_gpt2.py`.
"""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from jaxmp.report import compile_for

pytestmark = [pytest.mark.targets, pytest.mark.slow]

SCRIPT = (
    pathlib.Path(__file__).parents[2] / "examples" / "benchmarks" / "autocast_gpt2.py"
)

MODES = ("float32", "by-hand", "autocast")


@pytest.fixture(scope="module")
def measure():
    return runpy.run_path(str(SCRIPT))["measure"]


def test_the_h100_needs_half_of_the_memory_of_float32(measure):
    full, by_hand, cast = (measure(mode, "h100") for mode in MODES)
    print(f"GiB on the H100: float32 {full}, by hand {by_hand}, autocast {cast}")
    assert cast.temp <= by_hand.temp
    assert cast.arguments + cast.temp <= 0.49 * (full.arguments + full.temp)


def test_the_v5e_needs_no_more_memory_than_by_hand(measure):
    by_hand, cast = (measure(mode, "tpu-v5e") for mode in MODES[1:])
    print(f"GiB on the v5e: by hand {by_hand}, autocast {cast}")
    assert cast.temp <= by_hand.temp
    assert cast.accessed <= 63.9


def test_resnet_needs_the_memory_of_dtypes_by_hand_on_the_h100(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from models import JOBS
    from ways import by_hand, with_jaxmp

    job = JOBS["ResNet-50"]
    key = jax.eval_shape(lambda: jax.random.key(0))

    def peak(training):
        args = jax.eval_shape(training.init, key), jax.eval_shape(job.batch, key)
        compiled = compile_for("h100", training.step, *args, donate_argnums=0)
        stats = compiled.memory_analysis()
        return (stats.argument_size_in_bytes + stats.temp_size_in_bytes) / 2**30

    hand = peak(by_hand(job, dtype=jnp.bfloat16))
    cast = peak(with_jaxmp(job, dtype=jnp.bfloat16, autocast=True))
    print(f"GiB of ResNet-50 on the H100: by hand {hand:.3f}, autocast {cast:.3f}")
    assert cast <= 1.02 * hand
