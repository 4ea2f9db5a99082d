"""Importing jaxmp starts no backend, creates no array and loads nothing heavy."""

import functools
import os
import pkgutil
import subprocess
import sys

import pytest

import jaxmp

HEAVY = {"flax", "matplotlib", "orbax", "tqdm", "sklearn", "equinox", "pandas", "scipy"}
NEEDS_FLAX = {"jaxmp.modules", "jaxmp.training", "jaxmp.testing"}

# Under a platform that does not exist, every array and every look at a device fails.
NO_BACKEND = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}


def run(code, *, env=NO_BACKEND):
    """Runs code in a new interpreter that ends by naming the heavy modules loaded."""
    end = f"import sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    return subprocess.run(
        [sys.executable, "-c", f"{code}\n{end}"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=120,
    )


@functools.cache
def loaded_by(code):
    result = run(code)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


PUBLIC_MODULES = ["jaxmp"] + [
    f"jaxmp.{module.name}"
    for module in pkgutil.iter_modules(jaxmp.__path__)
    if not module.name.startswith("_")
]


def test_imports_start_nothing_and_load_nothing_heavy():
    before = loaded_by("import jax, jmp, optax")
    light = ", ".join(m for m in PUBLIC_MODULES if m not in NEEDS_FLAX)
    assert loaded_by(f"import {light}") <= before
    assert loaded_by(f"import {', '.join(PUBLIC_MODULES)}") <= {*before, "flax"}


def test_flax_is_imported_when_a_flax_thing_is_used():
    assert "flax" not in loaded_by("import jaxmp")
    assert "flax" in loaded_by("import jaxmp; jaxmp.TrainState")


def test_packages_are_imported_when_they_are_used():
    packages = ["modules", "numerics", "report", "testing"]
    used = "; ".join(f"jaxmp.{package}.__all__" for package in packages)
    assert run(f"import jaxmp; {used}").returncode == 0


def test_listing_names_imports_nothing():
    assert "flax" not in loaded_by("import jaxmp; dir(jaxmp); jaxmp.__all__")


@pytest.mark.parametrize(
    "code",
    [
        "import jaxmp, jax; jax.numpy.zeros(())",
        "import jaxmp; jaxmp.get_policy('auto')",
    ],
)
def test_the_check_can_fail(code):
    result = run(code)
    assert result.returncode != 0
    assert "no_such_platform" in result.stderr
    assert run(code, env={**os.environ, "JAX_PLATFORMS": "cpu"}).returncode == 0


def test_the_check_sees_what_is_loaded():
    assert "tqdm" in loaded_by("import tqdm")


def test_policies_are_read_without_a_backend():
    loaded_by("import jaxmp; str(jaxmp.get_policy('mixed_float16,matmul=tf32'))")


def test_an_old_jax_is_refused_with_both_versions_and_the_repair():
    result = run("import jax; jax.__version__ = '0.4.30'\nimport jaxmp")
    assert result.returncode != 0
    *_, message = result.stderr.strip().splitlines()
    assert message.startswith("jaxmp.errors.UnsupportedJaxVersion: ")
    assert "JAX 0.4.30 is installed" in message
    assert "JAX 0.10.0 or newer" in message
    assert "pip install --upgrade 'jax>=0.10.0'" in message
    assert "UnsupportedJaxVersion" not in run("import jaxmp").stderr
