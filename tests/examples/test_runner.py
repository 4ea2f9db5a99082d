"""The loop, the flags and the table that the examples share, on a tiny model."""

import dataclasses
import os
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import results
import runner

import jaxmp
from jaxmp import errors
from jaxmp.training import Checkpoints

DEFAULTS = ("float32", "mixed_float16", "mixed_bfloat16")
TX = optax.adam(0.1)


def prepare(policy, args):
    """Fits a line; the loss scale doubles on every step, into overflow."""

    def train_step(state, x):
        def loss_fn(params):
            w, x_ = policy.cast_to_compute((params["w"], x))
            return jnp.mean(policy.cast_to_output(w * x_ - 3 * x_) ** 2)

        scale = jaxmp.get_loss_scale(state)
        loss, grads = state.value_and_grad(loss_fn)(state.params)
        state = state.apply_gradients(grads=grads, value=loss)
        applied = jaxmp.loss_scale_metrics(state)["grads_finite"]
        return state, {"loss": loss, "loss_scale": scale, "applied": applied}

    state = jaxmp.TrainState.create(
        apply_fn=None,
        params={"w": jnp.ones(())},
        tx=jaxmp.loss_scaling(TX, policy, growth_interval=args.growth_interval),
        policy=policy,
    )

    def batch(step):
        if step == int(os.environ.get("INTERRUPT_AT", "-1")):
            os.kill(os.getpid(), signal.SIGINT)
        return np.random.default_rng(step).normal(size=4).astype(np.float32)

    def evaluate(state, *, in_half=False):
        dtype = runner.half_policy(policy).compute_dtype if in_half else jnp.float32
        return float(jnp.abs(state.params["w"].astype(dtype) - 3))

    return runner.Training(state, train_step, batch, evaluate, lambda s: s.params)


TOY = runner.Experiment(
    script=__file__,
    prepare=prepare,
    describe=lambda args: "a line",
    score="validation loss",
    steps=8,
    growth_interval=1,
)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs the toy with flags; returns its exit status and what it printed."""
    monkeypatch.setattr(results.compilers, "has_target", lambda target: False)

    def run_toy(*flags, interrupt_at=-1):
        monkeypatch.setenv("INTERRUPT_AT", str(interrupt_at))
        monkeypatch.setattr("sys.argv", ["toy.py", *flags])
        status = 0
        try:
            runner.run(TOY, ["--out", str(tmp_path), *flags])
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    return run_toy


def read_table(printed):
    """The table as one dictionary per row."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    header, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def arrays_and_losses(folder):
    with Checkpoints(folder) as checkpoints:
        args = runner.read_flags(TOY, [])
        state = prepare(jaxmp.get_policy("mixed_float16"), args).state
        arrays = [
            np.asarray(x).tobytes() for x in jax.tree.leaves(checkpoints.restore(state))
        ]
        history = checkpoints.notes()
    return arrays, [history[name] for name in ("loss", "loss_scale", "applied")]


def test_the_table_has_a_line_for_every_policy(run, tmp_path):
    status, printed = run()
    assert status == 0
    rows = read_table(printed)
    assert [row["policy"] for row in rows] == list(DEFAULTS)
    assert list(rows[0]) == [
        "policy",
        "validation loss",
        "difference to float32",
        "applied / skipped steps",
        "loss scale first, highest, last",
        "bytes of params",
        "seconds per step",
    ]
    assert rows[0]["difference to float32"] == "+0.00%"
    assert rows[2]["loss scale first, highest, last"] == "1, 1, 1"
    assert all(row["bytes of params"] == "4" for row in rows)
    assert "not a speed claim" in printed
    path = re.search(r"Plot: (.*)", printed)[1]
    assert path == str(tmp_path / "training.png")
    with open(path, "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_every_skip_is_counted_and_the_scale_backs_off(run):
    _, printed = run("--policy", "mixed_float16", "--steps", "40")
    (row,) = read_table(printed)
    applied, skipped = map(int, row["applied / skipped steps"].split("/"))
    first, highest, last = row["loss scale first, highest, last"].split(", ")
    assert applied + skipped == 40
    assert skipped > 0
    assert first == "2^16"
    assert int(highest[2:]) > 16
    assert int(last[2:]) <= int(highest[2:])
    assert "difference to float32" not in row


ROW = types.SimpleNamespace(peak=2**20)


def test_half_evaluation_and_h100_memory_are_columns_of_their_own(run, monkeypatch):
    monkeypatch.setattr(
        results,
        "compiled_rows",
        lambda experiment, args: dict.fromkeys(args.policies, ROW),
    )
    _, printed = run("--full-eval-in-half", "--steps", "2")
    for row in read_table(printed):
        assert row["step memory on the H100's compiler"] == "1.0 MiB"
        assert float(row["validation loss, all in half"]) == pytest.approx(
            float(row["validation loss"]), rel=1e-2
        )


def test_a_compiler_that_fails_costs_its_column_only(run, monkeypatch):
    def compile_step_of(*args, **kwargs):
        raise errors.CompilerFailed("out of order")

    monkeypatch.setattr(results.compilers, "has_target", lambda target: True)
    monkeypatch.setattr(results.compilers, "compile_step_of", compile_step_of)
    status, printed = run("--steps", "1")
    assert status == 0
    assert "It failed, so there is no column for it:\nout of order" in printed
    assert len(read_table(printed)) == 3


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(run, tmp_path):
    flags = ("--policy", "mixed_float16")
    assert run(*flags, "--checkpoint-dir", str(tmp_path / "a"))[0] == 0
    status, printed = run(
        *flags, "--checkpoint-dir", str(tmp_path / "b"), interrupt_at=4
    )
    assert status == 130
    assert f"saved in {tmp_path / 'b'}" in printed
    assert printed.rstrip().endswith("--resume")
    assert "|" not in printed
    with Checkpoints(tmp_path / "b") as checkpoints:
        assert checkpoints.latest_step() == 5
    assert run(*flags, "--checkpoint-dir", str(tmp_path / "b"), "--resume")[0] == 0
    assert arrays_and_losses(tmp_path / "b") == arrays_and_losses(tmp_path / "a")


def test_resuming_a_comparison_goes_on_with_the_policy_that_was_stopped(run, tmp_path):
    run(interrupt_at=3)
    assert os.listdir(tmp_path / "checkpoints") == ["float32"]
    _, resumed = run("--resume")
    _, uninterrupted = run()

    def without_time(printed):
        return [row | {"seconds per step": None} for row in read_table(printed)]

    assert without_time(resumed) == without_time(uninterrupted)


def test_a_finished_run_is_resumed_as_a_table(run):
    _, first = run()
    _, again = run("--resume")
    assert read_table(again) == read_table(first)


def test_resuming_under_another_policy_is_refused_unless_converted(run, tmp_path):
    run("--policy", "mixed_float16", "--steps", "4")
    status, _ = run("--policy", "mixed_bfloat16", "--resume")
    assert status.startswith("CheckpointPolicyMismatch: ")
    assert "'p=full,c=f16,o=full'" in status
    assert "'p=full,c=bf16,o=full'" in status
    status, printed = run("--policy", "mixed_bfloat16", "--resume", "--convert")
    assert status == 0
    (row,) = read_table(printed)
    assert row["loss scale first, highest, last"].endswith(", 1")


def test_resuming_from_nothing_is_refused(run, tmp_path):
    status, _ = run("--resume", "--checkpoint-dir", str(tmp_path / "typo"))
    assert status.startswith("InvalidCheckpoint: There is no checkpoint")
    assert str(tmp_path / "typo") in status


def test_named_checkpoints_are_never_overwritten(run, tmp_path):
    flags = ("--checkpoint-dir", str(tmp_path / "mine"), "--steps", "2")
    assert run(*flags)[0] == 0
    status, _ = run(*flags)
    assert "holds checkpoints" in status
    assert "--resume" in status
    assert (tmp_path / "mine" / "float32" / "2").is_dir()


def test_a_collapse_ends_the_run_with_its_cause(tmp_path):
    def prepare_nan(policy, args):
        nan = np.full(4, np.nan, np.float32)
        return prepare(policy, args)._replace(batch=lambda step: nan)

    experiment = dataclasses.replace(TOY, prepare=prepare_nan)
    flags = ["--policy", "mixed_float16", "--steps", "60", "--out", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"LossScaleCollapsed.*loss itself was non-finite"
    ):
        runner.run(experiment, flags)


FLAGS = [
    ([], list(DEFAULTS)),
    (["--policy", "float32, mixed_float16"], ["float32", "mixed_float16"]),
    (["--policy", "float32", "--policy", "16-true,float32"], ["float32", "16-true"]),
    (["--policy", "p=f32,c=bf16,o=f32"], ["p=f32,c=bf16,o=f32"]),
]


@pytest.mark.parametrize(("flags", "names"), FLAGS)
def test_policies_are_read_from_lists_and_repetitions(flags, names):
    args = runner.read_flags(TOY, flags)
    assert list(args.policies) == names
    assert len(set(args.folders.values())) == len(names)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--policy", "float17"], "float17"),
        (["--steps", "0"], "--steps counts steps"),
        (["--checkpoint-every", "-1"], "--checkpoint-every counts steps"),
    ],
)
def test_bad_flags_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        runner.read_flags(TOY, flags)
    assert words in capsys.readouterr().err
