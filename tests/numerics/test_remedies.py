"""What is advised against a NaN has been tried, and mends it when it is written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxmp
from jaxmp.cli import main
from jaxmp.numerics import find_nonfinite

W, X = jnp.full((4, 4), 10.0), jnp.full((2, 4), 10.0)
F16 = "mixed_float16"


def squares(w, x, keep=lambda f: f, cast=None):
    """400 * 400, which a matmul reads."""
    h = x @ w
    h = h if cast is None else h.astype(cast)
    return jnp.mean(keep(lambda h: (h * h) @ w)(h)) / 1e4


def in_a_scan(w, x, keep=lambda f: f, cast=None):
    def body(h, _):
        h = h if cast is None else h.astype(cast)
        g = keep(lambda h: (h * h / 40000) @ w)(h @ w)
        return g.astype(x.dtype), None

    return jnp.mean(jax.lax.scan(body, x, length=2)[0]).astype(jnp.float32)


def rematerialised(w, x, keep=lambda f: f, cast=None):
    h = x @ w
    h = h if cast is None else h.astype(cast)
    return jnp.mean(jax.checkpoint(keep(lambda h: (h * h / 1000) @ w))(h))


UNDER_AUTOCAST = [squares, in_a_scan, rematerialised]


@pytest.mark.parametrize("loss", UNDER_AUTOCAST)
def test_under_autocast_full_precision_is_advised_and_a_cast_is_not(loss):
    found = find_nonfinite(loss, W, X, policy=F16)
    assert found.kind == "divergence"
    assert found.float32_helps is True
    assert "jaxmp.full_precision(f)(x)" in found.repair
    assert "x.astype(jnp.float32) does nothing here" in found.repair
    assert f"test_remedies.py:{found.line}" in found.repair

    def kept(w, x):
        return loss(w, x, keep=jaxmp.full_precision)

    def cast(w, x):
        return loss(w, x, cast=jnp.float32)

    assert not find_nonfinite(kept, W, X, policy=F16)
    assert find_nonfinite(cast, W, X, policy=F16)


@pytest.mark.parametrize("loss", UNDER_AUTOCAST)
def test_inside_of_the_function_autocast_is_noticed(loss):
    found = find_nonfinite(jaxmp.autocast(loss, F16), W, X)
    assert found.float32_helps is True
    assert "jaxmp.full_precision(f)(x), with this line in f" in found.repair
    assert "does nothing under autocast" in found.repair
    assert "Tried on these numbers: it is finite, at most 1." in found.repair
    assert "float16 cannot hold: what reads it has to be in float32" in found.repair


def test_in_plain_half_precision_a_cast_is_advised():
    half = W.astype(jnp.float16), X.astype(jnp.float16)
    found = find_nonfinite(squares, *half)
    assert found.float32_helps is True
    assert "x.astype(jnp.float32) in front of it. Tried" in found.repair
    assert "full_precision" not in found.repair
    mended = find_nonfinite(lambda w, x: squares(w, x, cast=jnp.float32), *half)
    assert not mended, str(mended)


class Squares(nn.Module):
    cast: bool = False

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.constant(10.0)
        h = nn.Dense(4, kernel_init=start, name="up")(x)
        h = h.astype(jnp.float32) if self.cast else h
        return nn.Dense(1, name="down")(h * h / 1000)


def policy_loss(model, rules=jaxmp.default_rules):
    applied = jaxmp.apply_policy(model, F16, rules=rules)
    params = applied.init(jax.random.key(0), X)
    return lambda params: jnp.mean(applied.apply(params, X)), params


def test_under_apply_policy_what_is_advised_mends_it():
    found = find_nonfinite(*policy_loss(Squares()))
    assert found.float32_helps is True
    assert found.function == "Squares.__call__"
    is_planned = "jaxmp.full_precision(f)(x)" in found.repair
    if not is_planned:
        assert "x.astype(jnp.float32) in front of it. Tried" in found.repair
        assert not find_nonfinite(*policy_loss(Squares(cast=True)))


class Large(nnx.Module):
    def __init__(self):
        start = nnx.initializers.constant(1e4)
        self.up = nnx.Linear(4, 8, kernel_init=start, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.mean(self.up(x).astype(jnp.float32)) / 1e9


def test_in_a_layer_of_flax_under_apply_policy_a_rule_is_advised():
    model = jaxmp.apply_policy(Large(), F16)
    found = find_nonfinite(lambda model, x: model(x), model, X)
    assert found.float32_helps is True
    assert "rules=[jaxmp.PolicyRule(path='up', compute='float32')]" in found.repair
    assert "of apply_policy" in found.repair


class Summed(nn.Module):
    """Its island overflows in the backward pass only."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4, name="up")(x) * 3e4
        return jnp.sum(h * h)


def test_in_a_backward_pass_the_rule_names_the_layer_as_describe_does():
    model = Summed()
    params = model.init(jax.random.key(0), X)
    applied = jaxmp.apply_policy(model, F16)
    found = find_nonfinite(applied.apply, params, X, loss_scale=1.0)
    assert found.path == "Summed/up"
    assert "rules=[jaxmp.PolicyRule(path='up', compute='float32')]" in found.repair


def test_a_layer_of_flax_without_a_policy_takes_a_dtype():
    layer = nn.Dense(1, dtype=jnp.float16, kernel_init=nn.initializers.constant(1e4))
    params = layer.init(jax.random.key(0), X)
    found = find_nonfinite(lambda p: jnp.mean(layer.apply(p, X)), params)
    assert "dtype=jnp.float32 of this layer" in found.repair


class Layer(nn.Module):
    gain: float

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.constant(self.gain)
        return nn.Dense(4, kernel_init=start, name="up")(x) / self.gain / 4


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = Layer(2e4 if i == 1 else 0.25, name=f"layer_{i}")(x)
        return x


def test_a_rule_that_is_advised_under_autocast_mends_it():
    params = Deep().init(jax.random.key(0), X)

    def loss(params):
        return jnp.mean(Deep().apply(params, X))

    found = find_nonfinite(loss, params, policy=F16)
    rule = "jaxmp.PolicyRule(path='layer_1/up', compute='float32')"
    assert f"rules=[{rule}]" in found.repair
    assert "Tried: everything is finite if this layer stays" in found.repair
    rules = [jaxmp.PolicyRule(path="layer_1/up", compute="float32")]
    assert not find_nonfinite(loss, params, policy=F16, rules=rules)


# What float32 does not mend

HOPELESS = {
    "zero": lambda x: jnp.log(x - x),
    "beyond float32": lambda x: jnp.exp(100 * x),
    "negative": lambda x: jnp.sqrt(-x),
}


@pytest.mark.parametrize("case", HOPELESS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_float32_is_not_advised_where_it_does_not_help(case, dtype):
    fn = HOPELESS[case]
    found = find_nonfinite(lambda x: fn(x).sum(), jnp.ones(3, dtype))
    assert found.float32_helps is False
    assert "float32 does not help (tried)" in found.repair
    assert "x.astype(jnp.float32)" not in found.repair


def test_under_autocast_too_float32_is_not_advised_where_it_does_not_help():
    def loss(w, x):
        h = x @ w
        return jnp.mean((h / (h - h)) @ w)

    found = find_nonfinite(loss, W, X, policy=F16)
    assert found.float32_helps is False
    assert "Tried: float32 does not mend it" in found.repair
    assert "full_precision" not in found.repair


def test_float32_is_not_advised_in_float32():
    found = find_nonfinite(lambda x: jnp.exp(1000 * x).sum(), jnp.ones(3))
    assert found.float32_helps is None
    assert "float32" not in found.repair


def test_what_cannot_be_tried_is_said_to_be_untried():
    def square(x):
        return jax.pure_callback(lambda x: x * jnp.inf, x, x).sum()

    x = jnp.ones(3, jnp.float16)
    found = find_nonfinite(square, x, backward=False)
    assert found.float32_helps is not True


# Derivatives that a function takes itself


def network(w, t):
    h = jnp.tanh(t * w["in"])
    h = jnp.tanh(h @ w["hidden"])
    return (h @ w["out"])[0]


def weights():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "in": 80 * jax.random.normal(keys[0], (16,)),
        "hidden": jax.random.normal(keys[1], (16, 16)),
        "out": jax.random.normal(keys[2], (16, 1)),
    }


TIMES = jnp.linspace(-0.1, 0.1, 32)


def residual(w, times, net=network):
    """The squared second derivative, as of a physics-informed loss."""

    def once(t):
        return jax.jvp(lambda t: net(w, t), (t,), (1.0,))[1]

    def twice(t):
        return jax.jvp(once, (t,), (1.0,))[1]

    return jnp.mean(jax.vmap(twice)(times) ** 2)


@pytest.fixture(scope="module")
def of_residual():
    return find_nonfinite(residual, weights(), TIMES, policy=F16, loss_scale=2.0**-10)


def test_second_derivatives_overflow_in_the_forward_pass(of_residual):
    found = of_residual
    assert found.kind == "divergence"
    assert not found.is_backward
    assert "no loss scale helps" in str(found)
    assert (
        "inside a derivative of order 2 that the function takes itself, in the "
        "forward pass: the loss scale comes after it" in found.cause
    )


def test_a_cast_of_autocast_is_shown_where_it_is_read():
    def loss(w, x):
        large = jnp.exp(x @ w / 35)
        return jnp.mean(large @ w)

    found = find_nonfinite(loss, W, X, policy=F16)
    assert found.primitive == "convert_element_type"
    assert (found.file, found.function) == (__file__, loss.__qualname__)
    assert found.line == loss.__code__.co_firstlineno + 2
    assert "autocast makes this cast for dot_general" in found.cause


def test_what_is_to_stay_in_float32_is_recommended_and_mends_it(of_residual):
    assert of_residual.float32_helps is True
    assert f"test_remedies.py:{of_residual.line} " in of_residual.repair

    def kept(w, t):
        return jaxmp.full_precision(network)(w, t)

    def loss(w, times):
        return residual(w, times, net=kept)

    assert not find_nonfinite(loss, weights(), TIMES, policy=F16)


def test_diagnose_recommends_what_to_keep(of_residual, tmp_path, monkeypatch, capsys):
    source = "import runpy, functools\n"
    source += f"made = runpy.run_path({__file__!r}, run_name='tests.numerics.pinn')\n"
    source += "def make():\n"
    source += "    return made['residual'], made['weights'](), made['TIMES']\n"
    (tmp_path / "pinn.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", "pinn.py:make", "--fail-on", "nonfinite"]) == 1
    told = capsys.readouterr().out
    assert "cannot mend it, however low" in told
    assert f"everything is finite if test_remedies.py:{of_residual.line} is in" in told
    assert "jaxmp.full_precision(f)(x)" in told


def test_a_gradient_inside_of_the_function_is_no_gradient_of_the_loss():
    def penalty(x):
        slope = jax.grad(lambda x: jnp.sum(jnp.exp(x)))(x)
        return jnp.mean(slope**2)

    found = find_nonfinite(penalty, jnp.full(3, 9.0, jnp.float16))
    assert not found.in_gradient
    assert "no loss scale helps" in str(found)
    assert "gradients are not finite" not in str(found)


# What needs no float32


def test_a_mask_constant_is_called_one():
    def attention(x, mask):
        bias = jnp.where(mask, 0.0, -1e10).astype(x.dtype)
        return jax.nn.softmax(x + bias).sum()

    found = find_nonfinite(attention, jnp.ones((2, 4), jnp.float16), jnp.eye(2, 4) > 1)
    assert found.primitive == "convert_element_type"
    assert "a mask constant, -1e+10, overflows float16" in found.cause
    assert "jnp.finfo(scores.dtype).min" in found.repair
    assert "astype" not in found.repair


def test_what_a_lower_loss_scale_mends_needs_no_float32():
    def loss(w, x):
        return jnp.mean((x @ w).astype(jnp.float32) * 8)

    found = find_nonfinite(loss, W, X, policy=F16, loss_scale=2.0**22)
    assert found.kind == "handled overflow"
    assert found.float32_helps is None
    assert "full_precision" not in found.repair
