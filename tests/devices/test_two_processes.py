"""Two processes with four devices each train as one, and decide as one."""

import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import CheckpointMeshMismatch
from jaxmp.numerics import load_bad_batch
from jaxmp.sharding import state_shardings
from jaxmp.training import Checkpoints
from tests.devices import worker
from tests.devices.processes import Processes, run

BACKED_OFF = worker.FIRST_SCALE / 2
BOTH = pytest.mark.parametrize("process", [0, 1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run, whose second process meets an infinity in its part of a batch."""
    return run("trained", tmp_path_factory.mktemp("trained"))


@BOTH
def test_each_process_has_half_of_the_devices(trained, process):
    assert trained.said(process, "devices") == [
        {"kind": "devices", "here": 4, "all": 8}
    ]


@BOTH
def test_an_infinity_in_one_process_skips_the_step_of_both(trained, process):
    steps = trained.said(process, "step")
    assert [step["step"] for step in steps] == list(range(worker.STEPS))
    for step in steps:
        bad = step["step"] == worker.BAD_STEP
        assert bool(step["grads_finite"]) == (not bad)
        assert step["moved"] == (not bad)
    after = steps[worker.BAD_STEP]
    assert (after["loss_scale"], after["skipped_steps"]) == (BACKED_OFF, 1)
    assert steps[-1]["applied_steps"] == worker.STEPS - 1


def test_both_processes_print_the_same_scales_and_counts(trained):
    assert trained.said(0, "step") == trained.said(1, "step")


def test_a_step_by_hand_decides_as_one_too(trained):
    bad, good = trained.said(0, "by hand")
    assert (bad["finite"], bad["moved"], bad["scale"]) == (False, False, BACKED_OFF)
    assert (good["finite"], good["moved"], good["scale"]) == (True, True, BACKED_OFF)
    assert trained.said(1, "by hand") == [bad, good]


# The record of the bad batch


@pytest.mark.devices(8)
def test_the_bad_batch_is_written_once_and_whole(trained):
    records = [trained.said(process, "record")[0] for process in (0, 1)]
    assert [record["exists"] for record in records] == [True, False]
    assert [record["step"] for record in records] == [worker.BAD_STEP + 1] * 2
    loaded = load_bad_batch(trained.folder / "bad_0.npz")
    assert int(loaded.step) == worker.BAD_STEP + 1
    assert float(loaded.loss_scale) == worker.FIRST_SCALE
    expected = worker.batch_of(worker.BAD_STEP, mesh_of(8))
    assert loaded.batch.tobytes() == np.asarray(expected).tobytes()


# Policies


@BOTH
def test_two_policies_in_one_run_are_an_error_in_both(trained, process):
    (error,) = trained.said(process, "error")
    for words in (
        "process 0: 'p=full,c=f16,o=full'",
        "process 1: 'p=full,c=bf16,o=full'",
        "Start all with the same one",
    ):
        assert words in error["message"]


# Checkpoints on other meshes


def mesh_of(count):
    devices = jax.devices()[:count]
    kinds = (AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), devices=devices, axis_types=kinds)


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.mark.devices(8)
def test_a_checkpoint_of_eight_devices_goes_on_four_and_then_on_two(trained, tmp_path):
    state, _ = worker.new_state(mesh_of(8))
    with Checkpoints(trained.folder / "checkpoints") as checkpoints:
        saved = bits(checkpoints.restore(state))
    assert len(set(saved)) > 4
    folder = trained.folder / "checkpoints"
    for count in (4, 2):
        state, shardings = worker.new_state(mesh_of(count))
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(state)
        assert bits(restored) == saved
        assert jax.tree.map(lambda x: x.sharding, restored) == shardings
        moment = restored.opt_state.inner_state[1][0].mu["in"]
        assert len(moment.addressable_shards) == count
        assert moment.addressable_shards[0].data.shape == (worker.ROWS // count, 8)
        folder = tmp_path / str(count)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(worker.STEPS, restored)
    # And it trains on there.
    record = worker.no_bad_batch(batch=worker.batch_of(0, mesh_of(2)))
    step = worker.training_step(shardings)
    new, _ = step(restored, record, worker.batch_of(worker.STEPS, mesh_of(2)))
    metrics = jaxmp.loss_scale_metrics(new.opt_state)
    assert int(metrics["applied_steps"]) == worker.STEPS


@pytest.mark.devices(8)
def test_a_mesh_that_does_not_divide_an_array_is_named_with_its_path(trained):
    mesh = mesh_of(3)
    shapes = jax.eval_shape(lambda: worker.new_state(mesh_of(1))[0])
    shardings = state_shardings(
        shapes, worker.first_weights(), NamedSharding(mesh, P()), over=()
    )
    wrong = {**shardings.params, "in": NamedSharding(mesh, P(None, "data"))}
    shardings = shardings.replace(params=wrong)
    form = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
    with (
        Checkpoints(trained.folder / "checkpoints") as checkpoints,
        pytest.raises(
            CheckpointMeshMismatch,
            match=r"'params/in' with the shape \[16, 8\].*dimension 1 cannot be div",
        ),
    ):
        checkpoints.restore(form)


@pytest.mark.devices(8)
def test_shapes_with_shardings_are_enough_to_restore(trained):
    state, shardings = worker.new_state(mesh_of(4))
    form = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: state),
        shardings,
    )
    with Checkpoints(trained.folder / "checkpoints") as checkpoints:
        assert bits(checkpoints.restore(form)) == bits(checkpoints.restore(state))


# A process that dies


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_after_one_process_was_killed(trained, tmp_path):
    with Processes("killed", tmp_path) as processes:
        processes.wait_until_said("waits")
        processes.kill(1)
    resumed = run("resumed", tmp_path)
    for process in (0, 1):
        (end,) = resumed.said(process, "end")
        (whole,) = trained.said(process, "end")
        assert end["start"] == 4
        assert end["state"] == whole["state"]
    shutil.rmtree(tmp_path)
