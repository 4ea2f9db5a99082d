"""Both examples as a user runs them: in processes of their own, killed for real."""

import json
import pathlib
import re
import shlex
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import results
import runner
import train_digits
import train_lm

EXAMPLES = ["train_lm.py", "train_digits.py"]
FREQUENCIES_ONLY = 3.2  # the loss of knowing how frequent each character is, about


def finish(process, status=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    assert "Warning" not in err
    return out, err


def read_table(printed):
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    header, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def checkpoint_steps(folder):
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def wait_for_checkpoint(process, folder, step):
    while not any(saved >= step for saved in checkpoint_steps(folder)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def read_checkpoint(folder):
    """Bits of every array of the newest checkpoint, and the losses up to it."""
    step = folder / str(max(checkpoint_steps(folder)))
    arrays = ocp.StandardCheckpointer().restore(step / "arrays")
    bits = {k: (x.dtype, np.asarray(x).tobytes()) for k, x in arrays.items()}
    history = json.loads((step / "notes" / "metadata").read_text())["notes"]
    del history["seconds"]
    return bits, history


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_short_run_ends_with_the_table_and_the_plot(name, start, tmp_path):
    flags = ["--policy=mixed_float16", "--steps=12", "--growth-interval=1"]
    out, err = finish(start(name, *flags, "--out", tmp_path))
    (row,) = read_table(out)
    applied, skipped = map(int, row["applied / skipped steps"].split("/"))
    assert (row["policy"], applied + skipped) == ("mixed_float16", 12)
    assert skipped >= 1
    assert "mixed_float16: 100%" in err
    assert pathlib.Path(re.search(r"Plot: (.*)", out)[1]).is_file()
    history = read_checkpoint(tmp_path / "checkpoints")[1]
    assert history["applied"].count(False) == skipped


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_killed_and_interrupted_is_bit_identical_to_uninterrupted(
    name, start, tmp_path
):
    flags = ["--policy=mixed_float16", "--steps=60", "--checkpoint-every=4"]
    flags += ["--growth-interval=3", f"--out={tmp_path}"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start(name, *flags, f"--checkpoint-dir={whole}"))

    process = start(name, *flags, f"--checkpoint-dir={stopped}")
    wait_for_checkpoint(process, stopped, 12)
    process.kill()
    process.communicate()
    killed_at = max(checkpoint_steps(stopped))
    assert 12 <= killed_at < 60

    process = start(name, *flags, f"--checkpoint-dir={stopped}", "--resume")
    wait_for_checkpoint(process, stopped, killed_at + 8)
    process.send_signal(signal.SIGINT)
    out, _ = finish(process, status=130)
    assert killed_at + 8 <= max(checkpoint_steps(stopped)) < 60

    command = shlex.split(out.splitlines()[-1])
    assert command[0] == "python"
    finish(start(pathlib.Path(command[1]).name, *command[2:]))
    bits, history = read_checkpoint(stopped)
    expected_bits, expected_history = read_checkpoint(whole)
    assert history == expected_history
    assert bits == expected_bits
    assert False in history["applied"]
    assert any(
        name.endswith("loss_scale/value") or name.endswith("loss_scale")
        for name in bits
    )


@pytest.mark.slow
def test_the_language_model_learns_alike_in_all_three_precisions(start, tmp_path):
    flags = ["--steps=100", "--growth-interval=10", "--full-eval-in-half"]
    out, _ = finish(start("train_lm.py", *flags, f"--out={tmp_path}"))
    rows = read_table(out)
    assert len(rows) == 3
    for row in rows:
        loss = float(row["validation loss"])
        assert loss < FREQUENCIES_ONLY - 0.4
        assert loss == pytest.approx(float(rows[0]["validation loss"]), rel=0.02)
        assert float(row["validation loss, all in half"]) == pytest.approx(
            loss, rel=5e-3
        )
    assert [row["applied / skipped steps"].endswith("/ 0") for row in rows] == [
        True,
        False,
        True,
    ]


@pytest.mark.slow
def test_digits_are_recognised_in_all_three_precisions(start, tmp_path):
    out, _ = finish(
        start("train_digits.py", "--full-eval-in-half", f"--out={tmp_path}")
    )
    rows = read_table(out)
    assert len(rows) == 3
    for row in rows:
        for column in ("test accuracy", "test accuracy, all in half"):
            assert float(row[column].rstrip("%")) >= 97


@pytest.mark.targets
@pytest.mark.parametrize("example", [train_lm, train_digits])
def test_half_precision_takes_less_memory_on_the_h100(example):
    args = runner.read_flags(example.EXPERIMENT, [])
    rows = results.compiled_rows(example.EXPERIMENT, args)
    memory = {name: row.peak for name, row in rows.items()}
    assert list(memory) == ["float32", "mixed_float16", "mixed_bfloat16"]
    assert memory["mixed_float16"] < memory["float32"]
    assert memory["mixed_bfloat16"] < memory["float32"]
