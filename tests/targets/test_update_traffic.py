"""The update step on the TPU v5e and H100 compilers: skipping costs no traffic.

Prints the table of `examples/benchmarks/update_traffic.py`, which it runs.
"""

import pytest
import update_traffic

pytestmark = pytest.mark.targets


@pytest.fixture(scope="module")
def rows(request):
    rows = {
        (*case, target): update_traffic.measure(*case, target)
        for target in update_traffic.TARGETS
        for case in update_traffic.cases()
    }
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + update_traffic.table(rows.values()))
    return rows


@pytest.mark.parametrize(
    "update", ["loss_scaling(clip + adamw)", "loss_scaling, grads_are_scaled"]
)
def test_skipping_adds_no_traffic_to_a_clipped_step(rows, update):
    bare = rows["clip + adamw", "float16", "tpu-v5e"]
    scaled = rows[update, "float16", "tpu-v5e"]
    assert scaled.bytes <= 1.02 * bare.bytes
    assert scaled.temp <= 0.1


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
@pytest.mark.parametrize("grads", ["float16", "float32"])
def test_skipping_adds_no_pass_over_the_weights(rows, grads, target):
    bare = rows["clip + adamw", grads, target]
    scaled = rows["loss_scaling(clip + adamw)", grads, target]
    assert bare.passes == scaled.passes == 2
    assert scaled.temp <= 0.1


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_without_a_clip_the_finite_check_is_one_pass(rows, target):
    assert rows["adamw", "float32", target].passes == 1
    assert rows["loss_scaling(adamw)", "float32", target].passes == 2


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_scale_one_without_skipping_is_the_bare_optimizer(rows, target):
    bare = rows["clip + adamw", "float16", target]
    unguarded = rows["loss_scaling, scale 1, no skip", "float16", target]
    assert unguarded.passes == bare.passes
    assert unguarded.temp == pytest.approx(bare.temp, abs=0.01)
    if target == "tpu-v5e":
        assert unguarded.bytes == pytest.approx(bare.bytes, rel=1e-3)


@pytest.mark.parametrize("inner", ["adamw", "clip + adamw"])
def test_the_cond_of_apply_if_finite_costs_twice_the_traffic(rows, inner):
    ours = rows[f"loss_scaling({inner})", "float32", "tpu-v5e"]
    theirs = rows[f"apply_if_finite({inner})", "float32", "tpu-v5e"]
    assert theirs.bytes > 1.5 * ours.bytes
    assert theirs.temp > 10 * ours.temp
    assert theirs.passes > ours.passes
