"""The command line: what it prints, writes and returns, and how it takes mistakes."""

import json
import subprocess
import sys

import pytest

import jaxmp
from jaxmp.cli import main

MODULE = """
import jax
import jax.numpy as jnp
import numpy as np

W = jax.ShapeDtypeStruct((256, 128), jnp.float32)
X = jax.ShapeDtypeStruct((8, 256), jnp.float32)


def step(w, x):
    return jnp.tanh(x @ w).sum()


def make_step():
    return step, W, X


def make_half(policy):
    dtype = jnp.bfloat16 if "16" in policy else jnp.float32
    return step, W.update(dtype=dtype), X.update(dtype=dtype)


def leaking(w, x):
    h = x @ w
    return (h * np.float32(0.125)) @ w.T


def make_leak():
    return leaking, W.update(dtype=jnp.bfloat16), X.update(dtype=jnp.bfloat16)


def make_nothing():
    return 3


def make_error():
    raise KeyError("no data here")


number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "steps.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXMP_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("steps", None)


COMMANDS = {
    "doctor": ["doctor"],
    "policy": ["policy", "mixed_float16"],
    "report": ["report", "steps:make_step", "--target", "cpu"],
    "audit": ["audit", "steps:make_half"],
}


@pytest.fixture(params=COMMANDS.values(), ids=COMMANDS)
def command(request):
    return request.param


def test_every_command_prints_text(command, capsys):
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 3
    assert not printed.startswith("{")


def test_every_command_prints_json(command, capsys):
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_every_command_writes_a_page(command, folder, capsys):
    assert main([*command, "--html", "page.html"]) == 0
    page = (folder / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert 'src="http' not in page
    capsys.readouterr()


def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command[0], "--help"])
    assert ended.value.code == 0
    assert "--fail-on" in capsys.readouterr().out


# What is found


def test_doctor_says_that_a_cpu_emulates(capsys):
    assert main(["doctor", "--fail-on", "emulated"]) == 1
    printed = capsys.readouterr()
    assert "The CPU emulates half precision: it saves no time here." in printed.out
    assert f"jax {jaxmp.cli._doctor.jax.__version__}" in printed.out
    assert "found emulated" in printed.err


def test_policy_explains_the_loss_scale(capsys):
    main(["policy", "mixed_float16"])
    assert "dynamic: starts at 65536" in capsys.readouterr().out
    assert main(["policy", "mixed_bfloat16", "--fail-on", "loss-scaling"]) == 0
    assert main(["policy", "bf16-true", "--fail-on", "half-params"]) == 1


def test_report_has_a_row_for_each_policy_and_target(capsys):
    policies = ["--policy", "float32", "--policy", "bfloat16"]
    main(["report", "steps:make_half", "--target", "cpu", *policies, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in rows] == ["float32", "bfloat16"]
    whole, half = (row["arguments"] for row in rows)
    assert whole == 2 * half == 4 * (256 * 128 + 8 * 256)


def test_report_writes_a_chart(folder, capsys):
    main(["report", "steps.py:make_step", "--target", "cpu", "--png", "chart.png"])
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


def test_audit_fails_on_a_widening_and_names_its_line(capsys):
    assert main(["audit", "steps:make_leak", "--fail-on", "upcast"]) == 1
    line = 1 + MODULE.splitlines().index("    return (h * np.float32(0.125)) @ w.T")
    assert f"steps.py:{line}" in capsys.readouterr().out
    assert main(["audit", "steps:make_half", "--fail-on", "upcast"]) == 0


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["report", "steps:make_stp"],
            "no 'make_stp'. Did you mean make_step",
        ),
        (["report", "steps"], "'steps' names no function"),
        (["report", "stepps:make_step"], "'stepps' cannot be imported"),
        (["report", "nofile.py:make_step"], "'nofile.py' cannot be imported"),
        (["report", "steps:number"], "steps:number is 3, which cannot be called"),
        (["report", "steps:make_nothing"], "make_nothing returned int"),
        (["audit", "steps:make_error"], "raised KeyError: 'no data here'"),
        (["report", "steps:make_step", "--target", "h1000"], "Did you mean 'h100'"),
        (["report", "steps:make_step", "--policy", "fp17"], "fp17"),
        (["policy", "mixed_float17"], "mixed_float17"),
        (["policy", "float32", "--html", "no/such/folder.html"], "no/such/folder.html"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_ends_with_status_2(arguments, words, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.startswith(f"jaxmp {arguments[0]}: ")
    assert "Traceback" not in printed.err
    assert not printed.out


def test_the_module_runs_as_a_program():
    told = subprocess.run(
        [sys.executable, "-m", "jaxmp", "policy", "bf16-mixed", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout)["compute"] == "bfloat16"
