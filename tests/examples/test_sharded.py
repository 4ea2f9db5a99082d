"""The example on all devices: it trains there, and divides what its layout says."""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest
import results
import runner
import train_lm
import train_lm_sharded
from jax.sharding import AbstractMesh

import jaxmp
from jaxmp.report.hlo._collectives import Collective

ARGS = runner.read_flags(train_lm_sharded.EXPERIMENT, [])
MESH = AbstractMesh((8,), ("data",), axis_types=train_lm_sharded.AUTO)


@functools.cache
def state():
    policy = jaxmp.get_policy("mixed_float16")
    return jax.eval_shape(lambda: train_lm.new_state(policy, ARGS))


def divided(tree):
    return [s.spec for s in jax.tree.leaves(tree) if "data" in s.spec]


def largest_part(layout):
    """What a device holds of the state, in bytes."""
    shardings = train_lm_sharded.shardings_of(state(), MESH, layout)

    def size(x, sharding):
        return int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, state(), shardings)))


@pytest.mark.parametrize(
    ("layout", "weights", "moments"),
    [("fsdp", True, True), ("zero1", False, True), ("dp", False, False)],
)
def test_a_layout_divides_what_it_says(layout, weights, moments):
    found = train_lm_sharded.shardings_of(state(), MESH, layout)
    assert bool(divided(found.params)) is weights
    assert bool(divided(found.opt_state)) is moments


def test_each_device_holds_its_part():
    whole = largest_part("dp")
    # A third of the state are weights, two thirds moments of AdamW.
    assert largest_part("zero1") == pytest.approx(whole * (1 + 2 / 8) / 3, rel=0.05)
    assert largest_part("fsdp") == pytest.approx(whole / 8, rel=0.3)


def test_all_policies_are_compared():
    assert list(ARGS.policies) == list(train_lm_sharded.POLICIES)
    assert len(set(ARGS.folders.values())) == 4
    assert str(ARGS.policies["mixed_bfloat16,reduce=float32"]).endswith(
        "reduce=float32"
    )


@pytest.mark.slow
def test_a_run_uses_eight_devices_and_ends_with_the_table(start, tmp_path):
    flags = ["--policy=mixed_bfloat16,reduce=float32", "--steps=3", f"--out={tmp_path}"]
    process = start("train_lm_sharded.py", *flags, platforms="cpu")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Warning" not in err
    assert "On 8 devices (cpu), fsdp." in out
    assert "| mixed_bfloat16,reduce=float32 |" in out
    assert pathlib.Path(re.search(r"Plot: (.*)", out)[1]).is_file()


def test_collectives_are_a_line_per_policy():
    def sent(kind, dtype, wire):
        return Collective(kind, dtype, 8, 1, 2 * wire, wire, "train_lm.py:1")

    class Row:
        class contents:  # noqa: N801
            collectives = (
                sent("all-gather", "bfloat16", 2**20),
                sent("all-gather", "bfloat16", 2**20),
                sent("all-reduce", "float32", 2**19),
                sent("all-reduce", "bfloat16", 2**18),
            )

    text = train_lm_sharded.collectives({"float32": Row, "mixed_bfloat16": Row})
    line = text.splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    reduced = "float32 0.5 MiB + bfloat16 0.2 MiB"
    assert cells == ["float32", "bfloat16 2.0 MiB", "none", reduced, "2.8 MiB"]


@pytest.mark.targets
def test_h100s_reduce_in_the_dtype_that_the_policy_says():
    rows = results.compiled_rows(train_lm_sharded.EXPERIMENT, ARGS)
    assert list(rows) == list(train_lm_sharded.POLICIES)

    def wire(policy, dtype, *kinds):
        found = rows[policy].contents.collectives
        return sum(train_lm_sharded.wire_of(found, kind, dtype) for kind in kinds)

    reduces = ("reduce-scatter", "all-reduce")
    for policy in train_lm_sharded.POLICIES[1:3]:
        gathers = wire(policy, "bfloat16", "all-gather")
        assert gathers > 5 * wire(policy, "float32", "all-gather")
    assert wire("mixed_bfloat16", "bfloat16", *reduces) > 0.5 * 2**20
    assert wire("mixed_bfloat16,reduce=float32", "bfloat16", *reduces) == 0
