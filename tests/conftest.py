import collections
import importlib.util
import os
import time
from importlib import metadata

from tests.support.environment import environment_for, platform

# Before JAX starts.
os.environ |= environment_for(
    os.environ,
    jaxlib=metadata.version("jaxlib"),
    has_libtpu=importlib.util.find_spec("libtpu") is not None,
)

import hypothesis
import jax
import pytest

PLATFORM = platform(os.environ)
jax.config.update("jax_numpy_rank_promotion", "raise")
# What modules compute while tests are collected; see `pytest_runtest_setup`.
jax.config.update("jax_disable_most_optimizations", PLATFORM == "cpu")
# A busy machine is no failure, nor is a seed that generates too little.
hypothesis.settings.register_profile(
    "jaxmp",
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.filter_too_much,
    ],
)
hypothesis.settings.load_profile("jaxmp")


STARTED = pytest.StashKey[float]()
# Of few tests that take long: begun last, such a file would keep one process busy
# while the other has nothing left.
LONG = ("test_random_programs.py", "test_programs.py", "test_import_weight.py")


def pytest_addoption(parser):
    help_text = "skip tests that have not started so many seconds after the first"
    parser.addoption("--budget", type=float, default=float("inf"), help=help_text)
    parser.addoption("--share", type=int, default=1, help="run every n-th test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Puts the files of `LONG` first, and then those of most tests.

    Slow tests have a budget: files of few, which train, come before the sweeps.
    """
    items[:] = items[:: config.getoption("--share")]
    tests = collections.Counter(item.path for item in items)

    def place(item):
        is_slow = item.get_closest_marker("slow") is not None
        count = tests[item.path]
        return is_slow or item.path.name not in LONG, count if is_slow else -count

    items.sort(key=place)


def pytest_collection_finish(session):
    session.config.stash[STARTED] = time.monotonic()


def pytest_runtest_setup(item):
    if time.monotonic() - item.config.stash[STARTED] > item.config.getoption(
        "--budget"
    ):
        pytest.skip("the time budget is used up")
    if PLATFORM != "cpu" and item.get_closest_marker("cpu"):
        pytest.skip(f"is about programs of the CPU, and this is {PLATFORM}")
    if (devices := item.get_closest_marker("devices")) is not None:
        needed, *where = devices.args
        if (count := jax.device_count(*where)) < needed:
            pytest.skip(f"needs {needed} devices, and there is {count}")
    # LLVM's optimisation is much of the rest, and pays for what is run for long. On
    # other platforms, what is tested is what users run.
    usual = PLATFORM != "cpu" or any(
        map(item.get_closest_marker, ("optimised", "slow", "targets"))
    )
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
