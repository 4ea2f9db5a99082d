import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxmp
from jaxmp.errors import NonScalarLoss
from jaxmp.numerics import find_nonfinite
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import read_program

from .faults import FAULTS
from .healthy import HEALTHY, ZOO, network_of_the_zoo

every_fault = pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=pytest.mark.devices(f.devices), id=str(f)) for f in FAULTS],
)


@every_fault
# JAX says so itself where a constant does not fit; it does not say what comes of it.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_planted_fault_is_found(fault):
    fn, args, options = fault.make()
    found = find_nonfinite(fn, *args, **options)
    assert found, found
    told = str(found)
    assert (found.primitive, found.line) == (fault.primitive, fault.line), told
    assert found.line is None or found.file == __file__.replace(
        "test_find_nonfinite", "faults"
    )
    assert fault.cause in found.cause, told
    assert fault.repair in found.repair, told
    assert found.kind == fault.kind, told
    assert found.is_backward == fault.is_backward, told
    assert found.iterations == fault.iterations, told
    assert found.path.endswith(fault.path), told


@pytest.mark.parametrize("make", HEALTHY, ids=lambda make: make.__name__)
def test_healthy_program_raises_no_alarm(make):
    fn, args, options = make()
    found = find_nonfinite(fn, *args, **options)
    assert not found, str(found)
    assert str(found).startswith("Everything that comes out is finite")


@pytest.mark.slow
@pytest.mark.parametrize("model", ZOO, ids=str)
def test_networks_of_the_zoo_raise_no_alarm(model):
    fn, args, options = network_of_the_zoo(model)
    found = find_nonfinite(fn, *args, **options)
    assert not found, str(found)


# Handled or not


def scaled_loss(w, x):
    return jnp.mean((x @ w).astype(jnp.float32) * 8)


ARGS = (jnp.ones((4, 4), jnp.float16), jnp.ones((4, 4), jnp.float16))


def test_finite_scale_is_the_largest_power_of_two():
    found = find_nonfinite(scaled_loss, *ARGS, loss_scale=2.0**22)
    assert found.kind == "handled overflow"
    gradient = jax.jit(
        jax.grad(lambda w, scale: scaled_loss(w, ARGS[1]) * scale),
        compiler_options={"xla_allow_excess_precision": False},
    )

    def is_finite(scale):
        return bool(jnp.isfinite(gradient(ARGS[0], jnp.float32(scale))).all())

    assert is_finite(found.finite_at_scale)
    assert not is_finite(2 * found.finite_at_scale)
    assert not find_nonfinite(scaled_loss, *ARGS, loss_scale=found.finite_at_scale)
    exponent = int(np.log2(found.finite_at_scale))
    assert f"finite at loss scale 2^{exponent}, and dynamic loss scaling" in str(found)


def test_infinite_metric_hides_no_handled_overflow():
    def loss(w, x):
        return scaled_loss(w, x), {"best": jnp.inf}

    found = find_nonfinite(loss, *ARGS, loss_scale=2.0**22)
    assert found.kind == "handled overflow"


def test_scale_below_one_is_said_to_need_a_lower_minimum():
    def loss(w):
        return jnp.mean(w.astype(jnp.float32) * 1e6)

    found = find_nonfinite(loss, jnp.ones(2, jnp.float16))
    assert found.kind == "handled overflow"
    assert found.finite_at_scale == 2.0**-3
    assert "min_scale" in str(found)


def test_debug_nans_does_not_abort():
    with jax.debug_nans(True), jax.debug_infs(True):
        found = find_nonfinite(scaled_loss, *ARGS, loss_scale=2.0**22)
    assert found.kind == "handled overflow"


def test_float16_loss_is_scaled_by_no_more_than_float16_holds():
    def loss(w):
        return jnp.mean(w)

    assert not find_nonfinite(loss, jnp.ones(8, jnp.float16), loss_scale=2.0**24)


@pytest.mark.parametrize(
    "scale",
    [
        1024,
        1024.0,
        np.float32(1024),
        jnp.float32(1024),
        jaxmp.StaticLossScale(1024),
        jaxmp.static_loss_scaling(optax.sgd(0.1), 1024).init({"w": jnp.ones(2)}),
    ],
    ids=["int", "float", "numpy", "jax", "LossScale", "state"],
)
def test_loss_scale_is_a_number_or_holds_one(scale):
    found = find_nonfinite(lambda w: jnp.mean(w), jnp.ones(2), loss_scale=scale)
    assert not found
    assert found.loss_scale == 1024


def test_saved_batch_is_replayed():
    saved = {
        "params": {"w": jnp.ones(3)},
        "batch": {"x": jnp.array([1.0, -1.0, 2.0]), "tokens": jnp.arange(3)},
        "loss_scale": jnp.float32(1024),
    }

    def loss(params, batch):
        return jnp.log(params["w"] * batch["x"]).sum()

    found = find_nonfinite(
        loss, saved["params"], saved["batch"], loss_scale=saved["loss_scale"]
    )
    assert found.primitive == "log"
    assert found.loss_scale == 1024
    assert found.reached == ("the loss",)


# What is looked at


def test_gradients_of_chosen_arguments():
    def loss(w, x):
        return (w * jnp.sqrt(x)).sum()

    args = jnp.ones(2), jnp.zeros(2)
    assert not find_nonfinite(loss, *args)
    found = find_nonfinite(loss, *args, argnums=(0, 1))
    assert found.reached == ("the gradient of x",)


def test_auxiliary_outputs_and_keyword_arguments():
    def loss(params, *, x):
        return params["w"].sum(), {"ratio": x / jnp.sum(x)}

    found = find_nonfinite(loss, {"w": jnp.ones(2)}, x=jnp.zeros(2))
    assert found.reached == ("the output[1]['ratio']",)
    assert found.primitive == "div"


def test_state_of_nnx_modules():
    class Counter(nnx.Module):
        def __init__(self):
            self.mean = nnx.BatchStat(jnp.zeros(2))

        @nnx.jit
        def __call__(self, x):
            self.mean[...] = jnp.log(x)
            return x

    found = find_nonfinite(lambda model, x: model(x), Counter(), jnp.zeros(2))
    assert found.reached == ("the new model.mean",)
    assert found.primitive == "log"


def test_backward_has_to_have_a_loss():
    with pytest.raises(NonScalarLoss, match="no floating scalar"):
        find_nonfinite(jnp.sin, jnp.ones(3), backward=True)


def test_rules_are_those_of_autocast():
    def loss(w, x):
        with jax.named_scope("head"):
            return ((x @ w) / 100).astype(jnp.float32).mean()

    args = jnp.full((4, 4), 200.0), jnp.full((4, 4), 200.0)
    found = find_nonfinite(loss, *args, policy="mixed_float16")
    assert found.primitive == "dot_general"
    assert "rules=[jaxmp.PolicyRule(path='head', compute='float32')]" in found.repair
    rules = [jaxmp.PolicyRule(path="head", compute="float32")]
    assert not find_nonfinite(loss, *args, policy="mixed_float16", rules=rules)


def test_effects_and_platforms():
    def loss(w):
        jax.debug.callback(lambda x: None, w.sum())
        y = lax.platform_dependent(w, cpu=jnp.log, cuda=jnp.log, default=jnp.sin)
        return y.sum()

    found = find_nonfinite(loss, jnp.zeros(2))
    assert found.primitive == "log"
    assert not find_nonfinite(loss, jnp.ones(2))


def test_half_that_overflows_inside_of_a_loop():
    def loss(w):
        def body(h, _):
            return (h * h).astype(jnp.float16).astype(jnp.float32) / 1000, None

        return lax.scan(body, w, None, 2)[0]

    found = find_nonfinite(loss, jnp.float32(300), backward=False)
    assert (found.primitive, found.iterations) == ("convert_element_type", (0,))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_derivative_is_told_from_what_it_is_the_derivative_of(wrap):
    @wrap
    def loss(w):
        for _ in range(2):
            w = w**0.5
        return w.sum()

    found = find_nonfinite(loss, jnp.array([0.0, 1.0]))
    assert found.cause.startswith("the derivative of pow at 0"), str(found)


def test_nan_argument_comes_before_what_else_is_made():
    found = find_nonfinite(
        lambda w, x: (jnp.log(x) * w).sum(), jnp.array([1.0, jnp.nan]), jnp.zeros(2)
    )
    assert found.primitive == "input"


# What is told


def test_report_in_plain_words():
    def loss(w, x):
        with jax.named_scope("head"):
            return jnp.mean(jnp.exp(w * x))

    told = str(find_nonfinite(loss, jnp.float32(50), jnp.array([1.0, 2.0])))
    lines = told.splitlines()
    assert lines[0] == "Divergence, first Inf made by exp: no loss scale helps."
    assert lines[2].startswith(f"  where     head, {__file__}:")
    assert lines[2].endswith(", in test_report_in_plain_words.<locals>.loss, forward")
    assert lines[3:6] == [
        "  operand   float32[2] between 50 and 100",
        "  result    float32[2] between 5.185e+21 and 5.185e+21, 1 not finite",
        "  reaches   the loss",
    ]
    assert lines[7] == "exp of 100 overflows float32, whose largest is 3.403e+38."
    assert lines[8].startswith("Subtract the maximum first")


def test_nothing_found_is_false():
    found = find_nonfinite(lambda w: w * 2, jnp.ones(2))
    assert not found
    assert str(found) == "Everything that comes out is finite."


# What it costs


class _Counter(Interpreter):
    count = 0

    def observe(self, site, operands, results):
        self.count += 1


def deep(layers):
    def loss(w, x):
        for i in range(layers):
            with jax.named_scope(f"layer_{i}"):
                x = jnp.tanh(x @ w)
        return x.sum()

    program = read_program(loss, (jnp.eye(4), jnp.ones((2, 4))), {})
    counter = _Counter()
    counter.run_program(program)
    return counter.count


def test_operations_carried_out_grow_with_the_program():
    four, eight, twelve = map(deep, (4, 8, 12))
    assert eight - four == twelve - eight


def test_the_catalogues_are_long_enough():
    assert len(FAULTS) >= 30
    assert len(HEALTHY) >= 30
