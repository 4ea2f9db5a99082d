"""What `doctor` says to do, on machines that are not here."""

import json

import pytest

from jaxmp.cli import main
from jaxmp.cli._next_steps import Machine, find_outdated, next_steps

CPU = {"device": "cpu", "platform": "cpu", "policy": "float32", "emulated": True}
H100 = {
    "device": "NVIDIA H100 80GB HBM3",
    "platform": "gpu",
    "policy": "mixed_bfloat16",
    "emulated": False,
}
T4 = {**H100, "device": "Tesla T4", "policy": "mixed_float16"}
OLD_GPU = {**H100, "device": "Tesla P100", "policy": "float32"}
V6E = {**H100, "device": "TPU v6 lite", "platform": "tpu"}
VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2"}
TARGETS = dict.fromkeys(("h100", "tpu-v5e", "tpu-v6e"), True)


def steps(*devices, **changes):
    machine = Machine(devices, VERSIONS, dict.fromkeys(TARGETS, False), {})
    return next_steps(machine._replace(**changes))


def test_a_cpu_trains_in_float32_and_tests_the_rest():
    first, audit, targets = steps(CPU)
    assert first.startswith('Train with policy = "float32" here')
    assert '"mixed_bfloat16" for a TPU' in first
    assert "python -m jaxmp audit" in audit
    assert targets.endswith("pip install 'jaxmp[targets]'")


@pytest.mark.parametrize(
    ("device", "words", "target"),
    [
        (H100, 'policy = "mixed_bfloat16": jaxmp.autocast', "h100"),
        (T4, 'policy = "mixed_float16". It needs a loss scale', "h100"),
        (V6E, 'policy = "mixed_bfloat16": jaxmp.autocast', "tpu-v6e"),
        (OLD_GPU, "nothing says that half precision is faster", "h100"),
    ],
)
def test_an_accelerator_has_its_policy_and_its_target(device, words, target):
    first, _, report = steps(device, targets=TARGETS)
    assert words in first
    assert report.endswith(f"--target {target}")


def test_unlike_devices_have_a_policy_each():
    first, second, *_ = steps(H100, T4)
    assert '"mixed_bfloat16" on NVIDIA H100 80GB HBM3' in first
    assert '"mixed_float16" on Tesla T4' in second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hardware": ["cuda"]}, "an NVIDIA GPU, and JAX does not use it. Install its"),
        ({"hardware": ["rocm"]}, "Install JAX for ROCm"),
        ({"hardware": ["tpu"]}, "pip install 'jax[tpu]'"),
        (
            {"hardware": ["tpu"], "versions": {**VERSIONS, "libtpu": "0.0.52"}},
            'jax.devices("tpu")\'',
        ),
        (
            {"hardware": ["cuda"], "environment": {"JAX_PLATFORMS": "cpu"}},
            "JAX_PLATFORMS=cpu hides it: unset it.",
        ),
        (
            {"versions": {**VERSIONS, "jax-cuda12-plugin": "0.9.0"}},
            "jax-cuda12-plugin 0.9.0 is not for jaxlib 0.10.2",
        ),
        ({"outdated": ["jax>=0.10"]}, "pip install --upgrade 'jax>=0.10'"),
    ],
)
def test_what_is_missing_comes_first(changes, words):
    assert words in steps(CPU, **changes)[0]
    assert len(steps(CPU, **changes)) == 4


def test_an_accelerator_in_use_is_not_missing():
    assert len(steps(H100, hardware=["cuda"])) == 3
    assert len(steps(V6E, hardware=["tpu"])) == 3


def test_packages_that_are_too_old_are_found():
    asked = ["jax>=0.10", "flax >= 0.12", "optax>=0.2.8", "x>=1; extra == 'test'", "y"]
    installed = {"jax": "0.9.2", "flax": "0.12.0", "optax": "0.2.10", "x": "0"}
    assert find_outdated(asked, installed) == ["jax>=0.10"]
    assert find_outdated() == []


def test_doctor_ends_with_what_to_do(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "\nWhat to do:\n1. " in printed
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert f"1. {data['what to do'][0]}\n" in printed
