import collections
import importlib.util
import os
import time
from importlib import metadata

# Before JAX starts: eight CPU devices, and an environment in which the TPU and H100
# compilers can be loaded beside them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Compiling is most of the time, and much of that is the emitters of fusions, which
# JAX 0.10 can do without. Later ones do not know the flag, nor does the TPU compiler,
# and they stop at it.
if (
    metadata.version("jaxlib").startswith("0.10.")
    and importlib.util.find_spec("libtpu") is None
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# A busy machine is no failure.
hypothesis.settings.register_profile("jaxmp", deadline=None)
hypothesis.settings.load_profile("jaxmp")


STARTED = time.monotonic()
# Of few tests that take long: begun last, such a file would keep one process busy
# while the other has nothing left.
LONG = ("test_random_programs.py", "test_programs.py", "test_import_weight.py")


def pytest_addoption(parser):
    help_text = "skip tests that have not started after so many seconds"
    parser.addoption("--budget", type=float, default=float("inf"), help=help_text)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Puts the files of `LONG` first, and then those of most tests.

    Slow tests have a budget: files of few, which train, come before the sweeps.
    """
    tests = collections.Counter(item.path for item in items)

    def place(item):
        is_slow = item.get_closest_marker("slow") is not None
        count = tests[item.path]
        return is_slow or item.path.name not in LONG, count if is_slow else -count

    items.sort(key=place)


def pytest_runtest_setup(item):
    if time.monotonic() - STARTED > item.config.getoption("--budget"):
        pytest.skip("the time budget is used up")
    # LLVM's optimisation is much of the rest, and pays for what is run for long.
    usual = any(map(item.get_closest_marker, ("optimised", "slow", "targets")))
    if jax.config.read("jax_disable_most_optimizations") == usual:
        # Programs that were compiled the other way differ in last bits.
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", not usual)


@pytest.fixture
def strict():
    """Strict dtype promotion and a tracer-leak check, for jaxmp's own functions.

    Optax and Flax mix dtypes themselves, so tests that run them do without it.
    """
    with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
        yield
