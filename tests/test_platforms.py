"""Where the tests run: eight CPU devices, or what the environment asks for."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.support.environment import FOR_GPUS, HOST_DEVICES, environment_for, platform

ROOT = Path(__file__).parents[1]


def environment(jaxlib="0.10.2", has_libtpu=False, **outer):
    return environment_for(outer, jaxlib, has_libtpu)


def test_without_a_word_it_is_eight_devices_of_the_cpu():
    for outer in ({}, {"JAX_PLATFORMS": ""}, {"JAX_PLATFORMS": "cpu"}):
        found = environment(**outer)
        assert found["JAX_PLATFORMS"] == platform(found) == "cpu"
        assert f"{HOST_DEVICES}=8" in found["XLA_FLAGS"]
        assert "gpu" not in found["XLA_FLAGS"]


def test_a_gpu_has_the_cpu_beside_it_and_whole_float32_and_shares_its_memory():
    found = environment(JAX_PLATFORMS="cuda")
    assert found["JAX_PLATFORMS"] == "cuda,cpu"
    assert platform(found) == "cuda"
    assert set(FOR_GPUS) < set(found["XLA_FLAGS"].split())
    assert "xla_cpu" not in found["XLA_FLAGS"]
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert found["NVIDIA_TF32_OVERRIDE"] == "0"


def test_what_the_environment_says_holds():
    said = {
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_FLAGS": f"{HOST_DEVICES}=2 --xla_gpu_enable_triton_gemm=true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "NVIDIA_TF32_OVERRIDE": "1",
    }
    found = environment(**said)
    flags = found.pop("XLA_FLAGS").split()
    assert flags[:2] == said.pop("XLA_FLAGS").split()
    assert [f.split("=")[0] for f in flags].count("--xla_gpu_enable_triton_gemm") == 1
    assert found == found | said


def test_workers_find_what_the_first_process_has_set():
    for outer in ({}, {"JAX_PLATFORMS": "cuda"}):
        once = environment(**outer)
        assert environment(**once) == once


@pytest.mark.parametrize(
    ("jaxlib", "has_libtpu", "known"),
    [("0.10.2", False, True), ("0.10.2", True, False), ("0.12.0.1", False, False)],
)
def test_compilers_get_no_flag_that_they_do_not_know(jaxlib, has_libtpu, known):
    flags = environment(jaxlib, has_libtpu)["XLA_FLAGS"]
    assert ("--xla_cpu_use_fusion_emitters=false" in flags) is known


def start(*args, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-n", "0", "-rs", *args],
        cwd=ROOT,
        env={**os.environ, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_tests_are_skipped_where_devices_are_missing_or_the_cpu_is():
    # XLA stops at flags that it does not know; those for GPUs are among them here.
    alone = " ".join([f"{HOST_DEVICES}=1", *FOR_GPUS])
    runs = (
        start(
            *("tests/loss_scale/test_devices.py", "-k", "test_two_axes"),
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=alone,
        ),
        start(
            *("tests/cli/test_cli.py", "-k", "test_doctor_says_that_a_cpu_emulates"),
            JAX_PLATFORMS="cuda",
            XLA_FLAGS="",
        ),
    )
    devices, cpu = (run.communicate(timeout=300)[0] for run in runs)
    assert "needs 8 devices, and there is 1" in devices
    assert "is about programs of the CPU, and this is cuda" in cpu
    assert [run.returncode for run in runs] == [0, 0]
    for text in (devices, cpu):
        assert "1 skipped" in text
        assert "passed" not in text


def test_the_devices_are_those_that_were_asked_for():
    flags = os.environ["XLA_FLAGS"].split()
    (count,) = (f.split("=")[1] for f in flags if f.startswith(HOST_DEVICES))
    assert len(jax.devices("cpu")) == int(count)
