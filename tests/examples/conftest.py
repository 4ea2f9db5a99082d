import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts an example as a user would; what it compiles is kept for the next one."""
    cache = tmp_path_factory.mktemp("compiled")
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    del env["XLA_FLAGS"]

    def start_example(name, *flags, platforms=env["JAX_PLATFORMS"]):
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**env, "JAX_PLATFORMS": platforms},
        )

    return start_example
