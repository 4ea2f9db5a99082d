"""The command line: what it prints, writes and returns, and how it takes mistakes."""

import json
import re
import subprocess
import sys
import time

import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.cli._source import check_source
from jaxmp.errors import InvalidStep
from jaxmp.report.compile.progress import Progress

MODULE = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

MESH = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
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


def sharded(*shape):
    sharding = NamedSharding(MESH, PartitionSpec("data"))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def gathering(w, x):
    everywhere = NamedSharding(MESH, PartitionSpec())
    whole = jax.lax.with_sharding_constraint(w, everywhere)
    return x.astype(jnp.bfloat16) @ whole.astype(jnp.bfloat16)


def make_gathering():
    return gathering, sharded(256, 128), sharded(8, 256)


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


@pytest.mark.cpu
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


@pytest.mark.devices(8, "cpu")
def test_report_of_several_devices_fails_on_what_they_send(capsys):
    command = ["report", "steps:make_gathering", "--policy", "float32", "--quiet"]
    wide = [*command, "--target", "cpu:8", "--fail-on", "gathered-in-float32"]
    assert main(wide) == 1
    printed = capsys.readouterr()
    assert "found gathered-in-float32" in printed.err
    assert re.search(r"all-gather +float32 +8 +1 +0\.12 +0\.11", printed.out)
    assert re.search(r"at steps\.py:\d+ \(gathering\)", printed.out)
    assert main([*command, "--target", "cpu:8", "--fail-on", "reduced-in-half"]) == 0
    assert main([*command, "--target", "cpu:4"]) == 2
    assert "'cpu:4' has 4 devices, and the step is" in capsys.readouterr().err


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
        (["report", "steps.py:make_stp"], "Its functions: step, make_step, make_half"),
        (["audit", "steps.py:make_stp"], "Did you mean make_step"),
        (["diagnose", "steps:make_stp"], "Nothing was run."),
        (["report", "steps"], "'steps' does not name a function"),
        (["report", "stepps:make_step"], "'stepps' cannot be imported"),
        (["report", "nofile.py:make_step"], "There is no file 'nofile.py'"),
        (["audit", "nofile.py:make_step"], "end in .py: steps.py."),
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
    said = [line for line in printed.err.splitlines() if line[:1] != "["]
    assert said[0].startswith(f"jaxmp {arguments[0]}: ")
    assert "Traceback" not in printed.err
    assert not printed.out


SCRIPT = """
{first}
raise SystemExit("This script has trained for hours.")
"""
SCRIPTS = {
    "function": "def make_step():\n    pass",
    "decorated": "import functools\n@functools.cache\ndef make_step():\n    pass",
    "assigned": "make_step = lambda: None",
    "unpacked": "a, (make_step, b) = 1, (2, 3)",
    "imported": "from math import sin as make_step",
    "module": "import make_step.inner",
    "branch": "try:\n    x = 1\nexcept OSError:\n    def make_step():\n        pass",
    "star": "from math import *",
    "dynamic": "globals()['make_step'] = None",
    "on demand": "def __getattr__(name):\n    return None",
    "broken": "def make_step(:",
}
WITHOUT = {
    "another function": "def make_steps():\n    pass",
    "inside of a function": "def other():\n    make_step = 1\n    return make_step",
    "inside of a class": "class A:\n    def make_step(self):\n        pass",
    "read only": "import os\nprint(os, __name__)",
}


@pytest.mark.parametrize("form", WITHOUT)
@pytest.mark.parametrize("command", ["report", "audit", "diagnose"])
def test_a_script_without_the_function_is_not_run(command, form, folder, capsys):
    (folder / "script.py").write_text(SCRIPT.format(first=WITHOUT[form]))
    assert main([command, "script.py:make_step"]) == 2
    told = capsys.readouterr().err
    assert "script.py has no 'make_step'." in told
    assert "Nothing was run." in told
    assert main([command, "script:make_step"]) == 2
    assert "Nothing was run." in capsys.readouterr().err


@pytest.mark.parametrize("form", SCRIPTS)
def test_a_name_that_the_source_may_bind_is_looked_up(form, folder):
    (folder / "script.py").write_text(SCRIPTS[form])
    check_source("script", "make_step")
    check_source("script.py", "make_step.inner")


def test_modules_without_a_source_are_looked_up():
    check_source("math", "make_step")
    check_source("no.such.module", "make_step")


def test_the_functions_of_a_script_are_listed(folder):
    names = [f"function_{i}" for i in range(15)]
    source = "\n".join(f"def {name}(): pass" for name in [*names, "_private"])
    (folder / "script.py").write_text(source)
    with pytest.raises(InvalidStep, match=r"functions: function_0, .*11 and 3 more\."):
        check_source("script.py", "train")


# Progress


def test_a_report_says_what_it_does_and_how_long_it_takes(capsys):
    command = ["report", "steps:make_half", "--target", "cpu"]
    policies = ["--policy", "float32", "--policy", "bfloat16"]
    assert main([*command, *policies]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\[ *\d+ s\] ", line) for line in lines)
    said = [line.partition("] ")[2] for line in lines]
    assert said[0] == "loading steps:make_half"
    assert said[1] == "making the step under float32"
    assert "tracing bfloat16 on cpu" in said
    assert "1 of 2: float32 on cpu: compiling" in said
    first, second = (line for line in said if "compiled in" in line)
    assert re.search(r"compiled in \d+ s; about \d+ s left$", first)
    assert re.search(r"2 of 2: bfloat16 on cpu: compiled in \d+ s$", second)
    assert main([*command, *policies]) == 0
    assert "known from an earlier run" in capsys.readouterr().err
    assert main([*command, "--quiet"]) == 0
    assert not capsys.readouterr().err


def test_the_time_that_is_left_is_that_of_the_programs_before(capsys):
    progress = Progress(shown=True)
    progress.expect(4)
    progress.compiled("a", 80.0)
    progress.compiled("b", 160.0)
    progress.compiled("c", 30.0)
    progress.compiled("d", 30.0)
    said = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "a: compiled in 80 s; about 4 min left",
        "b: compiled in 3 min; about 4 min left",
        "c: compiled in 30 s; about 90 s left",
        "d: compiled in 30 s",
    ]


def test_a_short_command_says_nothing_and_a_long_one_what_it_is_doing(capsys):
    with Progress(shown=True, patience=60) as progress:
        progress.say("reading")
    assert not capsys.readouterr().err
    with Progress(shown=True, patience=0.05) as progress:
        progress.say("loading")
        time.sleep(0.3)
        progress.say("tracing")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["loading", "tracing"]
    with Progress(shown=True, patience=60) as progress:
        progress.say("loading")
        progress.hurry()
        progress.say("compiling")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["loading", "compiling"]


@pytest.mark.parametrize("command", ["audit", "diagnose"])
def test_a_slow_import_is_reported_unless_asked_not_to(
    command, folder, capsys, monkeypatch
):
    monkeypatch.setattr("jaxmp.cli._main._PATIENCE", 0.05)
    (folder / "slow.py").write_text("import time\ntime.sleep(0.5)\nmake_step = 3\n")
    assert main([command, "slow.py:make_step"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[ +0 s\] loading slow.py:make_step", told[0])
    assert main([command, "slow.py:make_step", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is 3, which cannot be called" in line


# Exit status


def test_the_exit_codes_are_in_the_help_of_every_command(capsys):
    for command in ([], *([name] for name in COMMANDS), ["diagnose"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert "exit status:\n  0  the command ran" in printed
        assert re.search(r"^  1 .*\n  2 ", printed, re.M)


def test_a_command_that_does_not_exist_ends_with_status_2(capsys):
    for arguments in (
        [],
        ["audti"],
        ["audit"],
        ["policy", "float32", "--fail-on", "x"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "usage: jaxmp" in capsys.readouterr().err


def test_a_failure_inside_is_no_finding(capsys, monkeypatch):
    monkeypatch.setattr("jaxmp.cli._policy.get_policy", lambda policy: 1 / 0)
    assert main(["policy", "float32", "--fail-on", "loss-scaling"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("jaxmp policy: failed with ZeroDivision")


@pytest.mark.parametrize("status", ["", "0", "'no data'"])
def test_a_script_that_exits_while_it_is_imported_is_a_mistake(status, folder, capsys):
    source = f"import sys\ndef make_step():\n    pass\nsys.exit({status})\n"
    (folder / "exits.py").write_text(source)
    assert main(["audit", "exits.py:make_step", "--fail-on", "upcast"]) == 2
    assert 'Put what it runs under: if __name__ == "__main__":' in (
        capsys.readouterr().err
    )


def test_nothing_is_said_where_nobody_looks(capsys):
    Progress().say("hello")
    assert not capsys.readouterr().err


def test_the_module_runs_as_a_program():
    told = subprocess.run(
        [sys.executable, "-m", "jaxmp", "policy", "bf16-mixed", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout)["compute"] == "bfloat16"


def test_a_reader_that_leaves_early_changes_nothing():
    command = f"{sys.executable} -m jaxmp policy float32 --fail-on loss-scaling"
    told = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
