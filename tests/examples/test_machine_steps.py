"""Timing on a real machine: what is begun, stored, and what a step starts with."""

import argparse
import os
import subprocess
import sys

import jax
import machine_page
import machine_process
import machine_programs
import machine_records
import machine_steps
import numpy as np
import pytest
from machine_programs import UPDATE, Case
from machine_records import Machine, Record
from models import TINY_JOBS

CPU = Machine("cpu", "cpu", "jax 0.10.2")


# The order


def test_the_most_important_come_first_and_nothing_twice():
    found = machine_programs.cases()
    assert found[:6] == [
        Case(model, f"bfloat16 {way}")
        for model in ("GPT-2 small", "ResNet-50")
        for way in ("by hand", "autocast", "apply_policy")
    ]
    assert len(set(found)) == len(found) == 4 * 9 + 7
    dtypes = [case.way.split()[0] for case in found if case.model != UPDATE]
    assert dtypes.index("float16") == dtypes.count("bfloat16") + dtypes.count("float32")
    assert [case.model for case in found[-7:]] == [UPDATE] * 7


def test_cases_are_chosen_by_model_and_way():
    found = machine_programs.cases([UPDATE, "BERT-Base"], ["float32", "loss_scaling"])
    assert found == [Case("BERT-Base", "float32"), Case(UPDATE, "loss_scaling")]


# Processes


@pytest.fixture
def worker(tmp_path, monkeypatch):
    def start(program):
        script = tmp_path / "worker.py"
        script.write_text(program)
        monkeypatch.setattr(machine_process, "WORKER", script)
        return machine_process.Worker([], dict(os.environ))

    return start


def test_a_process_answers_in_json_and_waits_to_be_let_go(worker):
    process = worker(
        "print('a warning')\nprint('{\"ready\": true}', flush=True)\n"
        "input()\nprint('{\"ms\": [1.5]}')"
    )
    assert process.answer(60) == {"ready": True}
    with pytest.raises(TimeoutError):
        process.answer(0.1)
    process.go()
    assert process.answer(60) == {"ms": [1.5]}
    process.end()


def test_a_process_that_dies_says_what_it_said_last(worker):
    process = worker(
        "import os\nos.write(2, b'a warning\\nout of memory\\n')\nos._exit(3)"
    )
    assert process.answer(60) == {"error": "ended with status 3: out of memory"}
    process.go()
    process.end()


def test_all_processes_share_a_cache_and_take_no_memory_before_they_need_it(
    monkeypatch,
):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    env = machine_process.environment("folder", autotune=False)
    assert env["JAX_COMPILATION_CACHE_DIR"] == "folder"
    assert env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert env["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_enable_triton_gemm=false"
    assert env["JAX_PLATFORMS"] == "cuda,cpu"
    assert machine_process.environment("", autotune=True)["XLA_FLAGS"] == "--xla_a=1"


# Programs


@pytest.mark.parametrize("model", ["GPT-2 small", "ResNet-50", "Transformer-XL base"])
def test_variables_are_those_of_the_model_and_as_small(model):
    job = TINY_JOBS[model]
    inputs, _ = jax.eval_shape(job.batch, jax.random.key(0))
    shapes = jax.eval_shape(job.model().init, jax.random.key(0), *inputs)
    made = machine_programs.like_first_values(shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        name = path[-1].key
        if name in ("scale", "var"):
            assert np.all(leaf == 1)
        elif name == "kernel":
            assert 0 < np.std(leaf) < 1


def test_a_way_starts_from_given_variables():
    job = TINY_JOBS["GPT-2 small"]
    training = machine_programs.WAYS["float16 autocast"](job)
    key = jax.random.key(0)
    shapes = jax.eval_shape(training.init, key)
    variables = machine_programs.like_first_values({"params": shapes.params})
    state = jax.eval_shape(training.init, key, variables)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
        lambda x: x.dtype, shapes
    )
    params = training.init(key, variables).params
    np.testing.assert_array_equal(
        params["wte"]["embedding"], variables["params"]["wte"]["embedding"]
    )


@pytest.mark.parametrize("name", machine_programs.UPDATES)
def test_an_update_keeps_the_types_of_what_it_takes(name):
    built = machine_programs.program(Case(UPDATE, name), tiny=True)
    state, loss = jax.eval_shape(built.step, *built.arguments)
    assert loss is None
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), built.arguments[0]
    )


def test_the_update_is_of_gpt2_smalls_parameters():
    built = machine_programs.program(Case(UPDATE, machine_programs.CLIP))
    assert built.shape == "124.4 M parameters in float32"


# Records


def test_records_are_added_and_the_last_of_a_kind_counts(tmp_path):
    path = tmp_path / "new" / "steps.jsonl"
    first = Record("m", "w", CPU, ms=(1.0, 2.0, 4.0), steps=6, error="")
    machine_records.add(first, path)
    machine_records.add(Record("m", "v", CPU, error="out of memory"), path)
    with path.open("a") as file:
        file.write('{"model": "cut o')
    second = Record("m", "w", CPU, ms=(3.0,))
    machine_records.add(second, path)
    assert machine_records.read([path, tmp_path / "none"]) == [
        second,
        Record("m", "v", CPU, error="out of memory"),
    ]
    assert first.median == 2.0


# The command


def flags(tmp_path, **given):
    usual = {"model": None, "way": None, "seconds": 1.0, "at_once": 1, "rounds": 2}
    more = {"steps": 2, "autotune": False, "tiny": False, "retry": False, "write": None}
    return argparse.Namespace(**{**usual, **more, **given})


def test_a_page_is_not_written_from_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_steps, "ask_for_machine", lambda env: CPU)
    with pytest.raises(SystemExit, match="--write needs an accelerator"):
        machine_steps.measure(flags(tmp_path, write="page.md"), tmp_path / "r.jsonl")


def test_a_tpu_is_refused_because_it_takes_one_process(tmp_path, monkeypatch):
    tpu = Machine("TPU v5 lite", "tpu", "jax 0.10.2")
    monkeypatch.setattr(machine_steps, "ask_for_machine", lambda env: tpu)
    with pytest.raises(SystemExit, match="TPU v5 lite lets one process in"):
        machine_steps.measure(flags(tmp_path), tmp_path / "r.jsonl")


def test_a_later_run_takes_what_is_missing_and_failures_on_demand(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(machine_steps, "ask_for_machine", lambda env: CPU)
    path = tmp_path / "steps.jsonl"
    options = machine_process.WITHOUT_TRITON
    done = Record("ResNet-50", "float32", CPU, options=options, ms=(1.0,))
    failed = Record("BERT-Base", "float32", CPU, options=options, error="broken")
    machine_records.add(done, path)
    machine_records.add(failed, path)
    for retry, expected in ((False, ["GPT-2"]), (True, ["GPT-2", "BERT-Base"])):
        models = ["ResNet-50", "BERT-Base", "GPT-2 small"]
        given = flags(tmp_path, model=models, way=["float32"], retry=retry)
        machine_steps.measure(given, path)  # too few seconds to begin anything
        lines = capsys.readouterr().out.splitlines()
        taken = [line.split()[3] for line in lines if line.startswith("not taken")]
        assert taken == expected


def test_the_command_times_stores_and_prints(tmp_path):
    script = machine_process.WORKER.with_name("machine_steps.py")
    command = [sys.executable, str(script), "--tiny", "--records", str(tmp_path)]
    command += ["--model", "GPT-2 small", "--way", "float32"]
    command += ["--way", "bfloat16 autocast", "--rounds", "2", "--steps", "2"]
    # Compiling is what takes time here.
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    run = {"env": env, "text": True, "stdout": subprocess.PIPE, "check": True}
    printed = subprocess.run(command, **run).stdout
    path = tmp_path / machine_records.STEPS
    records = {record.way: record for record in machine_records.read([path])}
    assert set(records) == {"float32", "bfloat16 autocast"}
    for record in records.values():
        assert record.error == ""
        assert len(record.ms) == 2
        assert min(record.ms) > 0
        assert record.planned > 400_000
        assert record.reused
    losses = [record.loss for record in records.values()]
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)
    assert "The CPU emulates half precision" in printed
    tables = machine_page.tables(machine_records.read([path]))
    assert printed.strip().endswith(tables)
