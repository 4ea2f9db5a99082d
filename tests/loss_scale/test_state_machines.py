"""The scale against plain-Python models of the scalers that users know."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmp
from jaxmp.errors import LossScaleOptionError, MultipleLossScales
from jaxmp.loss_scale.state_machines import (
    DynamicMachine,
    Scale,
    StaticMachine,
    next_scale,
)

HISTORIES = st.lists(st.booleans(), min_size=1, max_size=60)


class TorchGradScaler:
    """`torch.amp.GradScaler`, its arithmetic in float32 as in ATen's AmpKernels."""

    def __init__(self, scale, growth_interval, growth_factor, backoff_factor):
        self.scale = np.float32(scale)
        self.tracker = 0
        self.interval = growth_interval
        self.growth = growth_factor
        self.backoff = backoff_factor

    def update(self, finite):
        if not finite:
            self.scale = np.float32(self.scale * self.backoff)
            self.tracker = 0
            return
        self.tracker += 1
        if self.tracker == self.interval:
            with np.errstate(over="ignore"):
                grown = np.float32(self.scale * np.float32(self.growth))
            if np.isfinite(grown):
                self.scale = grown
            self.tracker = 0


class MegatronGradScaler:
    """Megatron-LM's `DynamicGradScaler`, with the largest scale that Apex has."""

    def __init__(self, machine):
        self.machine = machine
        self.scale = machine.init_scale
        self.tracker = 0
        self.hysteresis = machine.hysteresis

    def update(self, finite):
        m = self.machine
        if not finite:
            self.tracker = 0
            self.hysteresis -= 1
            if self.hysteresis <= 0:
                self.scale = max(self.scale * m.backoff_factor, m.min_scale)
            return
        self.tracker += 1
        if self.tracker == m.growth_interval:
            self.tracker = 0
            self.hysteresis = m.hysteresis
            self.scale = min(self.scale * m.growth_factor, m.max_scale)


@jax.jit
def scan_of_steps(start, options, history):
    def step(scale, finite):
        scale = next_scale(scale, finite, **options)
        return scale, scale.loss_scale

    return jax.lax.scan(step, start, history)[1]


def scales_of(machine, history):
    """The scale after every step; one compile for all machines and histories."""
    options = dataclasses.asdict(machine)
    del options["init_scale"]
    scales = scan_of_steps(machine.init(), options, padded(history))
    return np.asarray(scales)[: len(history)].tolist()


def padded(history):
    return np.pad(np.asarray(history, bool), (0, 60 - len(history)))


def dtypes(tree):
    return [x.dtype for x in jax.tree.leaves(tree)]


POWERS = st.integers(-8, 20).map(lambda n: 2.0**n)


@st.composite
def machines(draw):
    low, start, high = sorted(draw(st.tuples(POWERS, POWERS, POWERS)))
    return DynamicMachine(
        init_scale=start,
        min_scale=low,
        max_scale=high,
        growth_interval=draw(st.integers(1, 5)),
        growth_factor=draw(st.sampled_from([2.0, 4.0, 8.0])),
        backoff_factor=draw(st.sampled_from([0.5, 0.25, 0.125])),
        hysteresis=draw(st.integers(1, 3)),
    )


@settings(max_examples=200, deadline=None)
@given(history=HISTORIES, interval=st.integers(1, 4), start=st.integers(0, 120))
def test_follows_torch_grad_scaler(history, interval, start):
    machine = DynamicMachine(
        init_scale=2.0**start,
        growth_interval=interval,
        min_scale=2.0**-126,
        max_scale=2.0**126,
    )
    torch = TorchGradScaler(2.0**start, interval, 2.0, 0.5)
    expected = []
    for finite in history:
        torch.update(finite)
        expected.append(min(float(torch.scale), 2.0**126))
        torch.scale = np.float32(expected[-1])
    assert scales_of(machine, history) == expected


@settings(max_examples=300, deadline=None)
@given(machine=machines(), history=HISTORIES)
def test_follows_megatron_with_min_max_and_hysteresis(machine, history):
    model = MegatronGradScaler(machine)
    expected = []
    for finite in history:
        model.update(finite)
        expected.append(model.scale)
    assert scales_of(machine, history) == expected


@settings(max_examples=200, deadline=None)
@given(machine=machines(), history=HISTORIES)
def test_scale_is_a_power_of_two_between_min_and_max(machine, history):
    for scale in scales_of(machine, history):
        assert machine.min_scale <= scale <= machine.max_scale
        assert math.frexp(scale)[0] == 0.5


@settings(max_examples=20, deadline=None)
@given(history=HISTORIES, interval=st.integers(1, 4), hysteresis=st.integers(1, 3))
def test_the_transformation_follows_its_machine(history, interval, hysteresis):
    options = {"growth_interval": interval, "hysteresis": hysteresis}
    tx = jaxmp.loss_scaling(optax.identity(), "mixed_float16", **options)

    @jax.jit
    def run(grads):
        def step(state, grad):
            _, state = tx.update(grad, state)
            return state, state.loss_scale

        return jax.lax.scan(step, tx.init(jnp.zeros(())), grads)

    state, scales = run(jnp.where(padded(history), 1.0, jnp.nan))
    machine = DynamicMachine(**options)
    assert np.asarray(scales)[: len(history)].tolist() == scales_of(machine, history)
    assert int(state.applied_steps) == sum(history)
    assert int(state.applied_steps + state.skipped_steps) == 60


def test_grows_on_exactly_the_nth_good_step_in_a_row():
    machine = DynamicMachine(init_scale=8.0, growth_interval=3)
    good_bad = [True, True, False, True, True, True, True, True, True]
    assert scales_of(machine, good_bad) == [8, 8, 4, 4, 4, 8, 8, 8, 16]


def test_hysteresis_is_spent_by_any_bad_step_and_refilled_on_growth():
    machine = DynamicMachine(init_scale=64.0, growth_interval=2, hysteresis=2)
    history = [False, True, False, False, True, True, False, False]
    #          spends        backs  backs       refills  spends backs
    assert scales_of(machine, history) == [64, 64, 32, 16, 16, 32, 32, 16]


def test_the_scale_may_fall_below_one():
    machine = DynamicMachine(init_scale=1.0, min_scale=2.0**-4)
    assert scales_of(machine, [False] * 6) == [0.5, 0.25, 0.125, 1 / 16, 1 / 16, 1 / 16]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float32", 1024, "mixed_float16"])
def test_every_mode_has_the_same_state_type(policy):
    params = {"w": jnp.ones(3)}
    state = jaxmp.loss_scaling(optax.adam(0.1), policy).init(params)
    reference = jaxmp.dynamic_loss_scaling(optax.adam(0.1)).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(reference)
    assert dtypes(state) == dtypes(reference)


@pytest.mark.parametrize(
    ("policy", "scale"),
    [
        ("mixed_float16", 2.0**16),
        ("16-true", 2.0**16),
        ("p=f16,c=f32,o=f32", 2.0**16),
        ("p=f32,c=f32,o=f16", 2.0**16),
        ("mixed_bfloat16", 1.0),
        ("float32", 1.0),
        (512, 512.0),
        (0.25, 0.25),
        (np.float64(8), 8.0),
        (jnp.float32(8), 8.0),
        (jaxmp.NoOpLossScale(), 1.0),
        (jaxmp.StaticLossScale(32), 32.0),
        (jaxmp.DynamicLossScale(2.0**10), 2.0**10),
    ],
)
def test_policy_or_scale_decides_where_the_scale_starts(policy, scale):
    tx = jaxmp.loss_scaling(optax.sgd(0.1), policy)
    assert float(jaxmp.get_loss_scale(tx.init(jnp.ones(())))) == scale


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float32", 1024.0])
def test_a_scale_that_is_not_dynamic_never_moves(policy):
    tx = jaxmp.loss_scaling(optax.sgd(0.1), policy, growth_interval=1)
    state = first = tx.init(jnp.ones(()))
    for grad in (jnp.inf, 1.0, 1.0, jnp.nan):
        _, state = tx.update(jnp.float32(grad), state)
    assert float(state.loss_scale) == float(first.loss_scale)
    assert int(state.skipped_steps) == 2


def test_a_jmp_dynamic_scale_brings_its_options():
    given_scale = jaxmp.DynamicLossScale(
        2.0**4, period=2, factor=4, min_loss_scale=0.25
    )
    tx = jaxmp.loss_scaling(optax.identity(), given_scale, max_scale=2.0**5)
    state, scales = tx.init(jnp.ones(())), []
    for grad in (1, 1, jnp.nan, jnp.nan, jnp.nan, jnp.nan, jnp.nan):
        _, state = tx.update(jnp.float32(grad), state)
        scales.append(float(state.loss_scale))
    assert scales == [16, 32, 8, 2, 0.5, 0.25, 0.25]


def test_options_beside_a_jmp_scale_come_first():
    scale = jaxmp.DynamicLossScale(2.0**4, period=100)
    tx = jaxmp.loss_scaling(optax.identity(), scale, hysteresis=3, growth_interval=1)
    state = tx.init(jnp.ones(()))
    assert int(state.hysteresis_left) == 3
    assert float(tx.update(jnp.ones(()), state)[1].loss_scale) == 2.0**5


def test_a_state_of_bfloat16_goes_on_in_float16():
    params = jnp.ones(3)
    bf16 = jaxmp.loss_scaling(optax.adam(0.1), "mixed_bfloat16")
    f16 = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16", growth_interval=1)
    _, state = bf16.update(params, bf16.init(params), params)
    _, state = f16.update(params, state, params)
    assert float(state.loss_scale) == 2.0
    assert int(state.applied_steps) == 2


BAD_OPTIONS = [
    ({"init_scale": -65536.0}, "init_scale=-65536.0", "power of two"),
    ({"init_scale": 0}, "init_scale=0", "power of two"),
    ({"init_scale": 1000.0}, "init_scale=1000.0", "Use 512 or 1024"),
    ({"init_scale": float("inf")}, "init_scale=inf", "power of two"),
    ({"init_scale": float("nan")}, "init_scale=nan", "power of two"),
    ({"init_scale": "65536"}, "init_scale='65536'", "power of two"),
    ({"init_scale": True}, "init_scale=True", "power of two"),
    ({"init_scale": 2.0**127}, f"init_scale={2.0**127}", "2**126"),
    ({"min_scale": 3.0}, "min_scale=3.0", "Use 2 or 4"),
    ({"max_scale": 65504.0}, "max_scale=65504.0", "Use 32768 or 65536"),
    ({"growth_factor": 1.0}, "growth_factor=1.0", "above 1"),
    ({"growth_factor": 0.5}, "growth_factor=0.5", "above 1"),
    ({"growth_factor": 1.5}, "growth_factor=1.5", "Use 1 or 2"),
    ({"backoff_factor": 1.0}, "backoff_factor=1.0", "below 1"),
    ({"backoff_factor": 2}, "backoff_factor=2", "below 1"),
    ({"backoff_factor": 0}, "backoff_factor=0", "power of two"),
    ({"min_scale": 2.0, "max_scale": 1.0}, "min_scale=2.0", "max_scale=1.0"),
    ({"init_scale": 2.0**25}, "init_scale=33554432.0", "max_scale=16777216.0"),
    ({"init_scale": 0.5}, "init_scale=0.5", "min_scale=1.0"),
    ({"growth_interval": 0}, "growth_interval=0", "at least 1"),
    ({"growth_interval": 2.5}, "growth_interval=2.5", "integer"),
    ({"growth_interval": 10**10}, "growth_interval=10000000000", "at most 2147483647"),
    ({"hysteresis": 0}, "hysteresis=0", "at least 1"),
    ({"hysteresis": True}, "hysteresis=True", "integer"),
]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", 8.0])
@pytest.mark.parametrize(("options", "value", "repair"), BAD_OPTIONS)
def test_a_bad_option_is_shown_and_repaired_in_every_mode(
    policy, options, value, repair
):
    with pytest.raises(LossScaleOptionError) as error:
        jaxmp.loss_scaling(optax.sgd(0.1), policy, **options)
    assert value in str(error.value)
    assert repair in str(error.value)


@pytest.mark.parametrize("options", [options for options, _, _ in BAD_OPTIONS])
def test_dynamic_loss_scaling_refuses_the_same_options(options):
    with pytest.raises(LossScaleOptionError):
        jaxmp.dynamic_loss_scaling(optax.sgd(0.1), **options)


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(LossScaleOptionError, match=r"'grow_interval'.*growth_interval"):
        jaxmp.loss_scaling(optax.sgd(0.1), "mixed_bfloat16", grow_interval=2)


@pytest.mark.parametrize("scale", [-2, 0, 3, 1000.0, float("nan"), float("inf")])
def test_a_bad_static_scale_is_shown(scale):
    for make in (jaxmp.loss_scaling, jaxmp.static_loss_scaling):
        with pytest.raises(LossScaleOptionError, match=f"scale={scale}".split(".")[0]):
            make(optax.sgd(0.1), scale)


def test_a_boolean_is_no_scale():
    with pytest.raises(LossScaleOptionError, match="not True"):
        jaxmp.loss_scaling(optax.sgd(0.1), True)


@pytest.mark.parametrize("bad", [None, jnp.ones(3), 1j, optax.sgd(0.1)])
def test_what_is_neither_policy_nor_scale_is_an_error(bad):
    with pytest.raises(jaxmp.errors.PolicyError, match="not"):
        jaxmp.loss_scaling(optax.sgd(0.1), bad)


def test_a_jmp_scale_of_another_base_is_no_transformation():
    with pytest.raises(LossScaleOptionError, match=r"growth_factor=3"):
        jaxmp.loss_scaling(optax.sgd(0.1), jaxmp.DynamicLossScale(8.0, factor=3))


def test_two_scales_in_one_optimizer_show_the_right_order():
    inner = jaxmp.loss_scaling(optax.adam(0.1), "mixed_float16")
    chain = optax.chain(optax.clip_by_global_norm(1.0), inner)
    with pytest.raises(MultipleLossScales) as error:
        jaxmp.loss_scaling(chain, "mixed_float16").init(jnp.ones(3))
    assert "There are 2 loss scales" in str(error.value)
    assert "loss_scaling(optax.chain(" in str(error.value)


def test_machines_run_under_strict_promotion(strict):
    for machine in (StaticMachine(8.0), DynamicMachine(growth_interval=2)):
        scale = machine.init()
        for finite in (True, True, False):
            new = jax.jit(machine.next)(scale, jnp.bool_(finite))
            assert isinstance(new, Scale)
            assert [x.dtype for x in new] == [jnp.float32, jnp.int32, jnp.int32]
            assert not any(x.weak_type for x in new)
            scale = new
