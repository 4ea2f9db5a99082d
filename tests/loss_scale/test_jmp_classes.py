"""jmp's loss scales, without jmp's defects."""

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

import jaxmp
from jaxmp.errors import SelectPredicateError

SCALES = [
    jaxmp.NoOpLossScale(),
    jaxmp.StaticLossScale(2.0**4),
    jaxmp.DynamicLossScale(2.0**4),
]


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_unscale_undoes_scale(strict, scale, dtype):
    tree = {"x": jnp.array([1.5, -2.0], dtype), "n": jnp.int32(3)}
    back = scale.unscale(scale.scale(tree))
    np.testing.assert_array_equal(np.float32(back["x"]), np.float32(tree["x"]))
    assert back["n"] is tree["n"]


def test_scaling_a_float16_tree_does_not_overflow():
    scaled = jaxmp.StaticLossScale(2.0**16).scale(jnp.float16(4))
    assert (float(scaled), scaled.dtype) == (2.0**18, jnp.float32)


def test_dynamic_scale_of_a_training_loop(strict):
    traces = []

    @jax.jit
    def adjust(scale, finite):
        traces.append(1)
        return scale.adjust(finite)

    scale = jaxmp.DynamicLossScale(2.0**4, period=2, factor=4, min_loss_scale=0.5)
    seen = []
    for finite in (True, True, True, False, False, False, False):
        scale = adjust(scale, jnp.bool_(finite))
        seen.append(float(scale.loss_scale))
    assert seen == [16, 64, 64, 16, 4, 1, 0.5]
    assert len(traces) == 1
    assert (scale.period, scale.factor, scale.min_loss_scale) == (2, 4, 0.5)


@pytest.mark.parametrize("value", [10, 10.0, np.float64(10), jnp.float16(10)])
def test_any_number_that_jmp_takes_becomes_float32(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # int, as jmp
        scale = jaxmp.DynamicLossScale(value, factor=3)
    assert scale.loss_scale.dtype == jnp.float32
    assert float(scale.adjust(jnp.bool_(False)).loss_scale) == pytest.approx(10 / 3)


def test_growth_past_float32_keeps_the_scale():
    scale = jaxmp.DynamicLossScale(2.0**127, period=1)
    assert float(scale.adjust(jnp.bool_(True)).loss_scale) == 2.0**127


@pytest.mark.parametrize(
    "pred", [jnp.array([True, False]), jnp.float32(1), jnp.int32(0), 1]
)
def test_select_tree_wants_one_boolean(pred):
    with pytest.raises(SelectPredicateError, match="expected boolean scalar"):
        jaxmp.select_tree(pred, jnp.ones(2), jnp.zeros(2))


def test_adjust_wants_one_boolean():
    with pytest.raises(SelectPredicateError, match=r"shape \(2,\).*all_finite"):
        jaxmp.DynamicLossScale(2.0).adjust(jnp.array([True, False]))


def test_select_tree_takes_one_side_whole():
    good, bad = {"a": jnp.ones(2)}, {"a": jnp.full(2, jnp.nan)}
    for pred in (True, jnp.bool_(True), np.bool_(True)):
        np.testing.assert_array_equal(jaxmp.select_tree(pred, good, bad)["a"], 1.0)


OF_JMP = {
    "none": jmp.NoOpLossScale(),
    "static": jmp.StaticLossScale(jnp.float32(8)),
    "dynamic": jmp.DynamicLossScale(jnp.float32(8)),
    "in a state": {"scale": jmp.DynamicLossScale(jnp.float32(8))},
}


@pytest.mark.parametrize("name", OF_JMP)
def test_the_scales_of_jmp_itself_are_taken_as_ours(name):
    scale = OF_JMP[name]
    assert float(jaxmp.get_loss_scale(scale)) == (1 if name == "none" else 8)
    step = jax.jit(jaxmp.value_and_grad(lambda w: w**2))
    loss, grad = step(jnp.float32(3), loss_scale=scale)
    assert (float(loss), float(grad)) == (9.0, 6.0)
