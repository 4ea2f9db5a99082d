"""What a function takes, updates and returns is a sum over its calls: float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jaxmp
from jaxmp.casting import OpRule
from jaxmp.casting.planner._whole_function import plan_jaxpr, read_settings
from jaxmp.errors import AutocastRuleError

SIZE = 8
KEYS = jax.random.split(jax.random.key(0), 4)
W = jax.random.normal(KEYS[0], (SIZE, SIZE)) / SIZE**0.5
X = jax.random.normal(KEYS[1], (16, SIZE))
STATE = 1 + jax.random.uniform(KEYS[2], (SIZE, SIZE))
HIDDEN = 1 + jax.random.uniform(KEYS[3], (16, SIZE))


def average(w, h, x):
    h = 0.999 * h + 0.001 * (x @ w)
    return h, h @ w


def retention(w, s, x):
    s = 0.97 * s + (x @ w).T @ x
    return s, x @ s


def delta_rule(w, s, x):
    k = x @ w
    s = s + 0.1 * k.T @ (x - k @ s)
    return s, x @ s


def euler(w, h, x):
    h = h + 0.01 * jnp.tanh(h @ w + x)
    return h, h @ w


def runge_kutta(w, h, x):
    def f(h):
        return jnp.tanh(h @ w + x)

    k1 = f(h)
    k2 = f(h + 0.05 * k1)
    h = h + 0.05 * (k1 + k2)
    return h, h @ w


def gated(w, h, x):
    gate = jax.nn.sigmoid(4 + x @ w)
    h = gate * h + (1 - gate) * (x @ w)
    return h, h @ w


def twice(w, h, x):
    """The state is read between two updates."""
    h = 0.99 * h + 0.01 * (x @ w)
    y = h @ w
    return 0.99 * h + 0.01 * y, y


def masked(w, h, x):
    new = h + 0.001 * (x @ w)
    h = jnp.where(x[:, :1] > 1e3, h, new)
    return h, h @ w


STEPS = [average, retention, delta_rule, euler, runge_kutta, gated, twice, masked]


def in_jit(step):
    return jax.jit(step)


def in_calls(step):
    def run(w, h, x):
        h, y = jax.checkpoint(jax.jit(step))(w, h, x)
        return h, y @ w

    return run


def in_cond(step):
    def run(w, h, x):
        def skip(h):
            return h, jnp.zeros_like(x)

        return lax.cond(x[0, 0] > 1e3, skip, lambda h: step(w, h, x), h)

    return run


def in_loop(step):
    def run(w, h, x):
        return lax.scan(lambda h, x: step(w, h, x), h, jnp.stack([x] * 4))

    return run


def in_dict(step):
    def run(w, h, x):
        h, y = step(w, h["a"]["b"], x)
        return {"a": {"b": h}}, y

    return lambda w, h, x: jax.tree.leaves(run(w, {"a": {"b": h}}, x))


def is_rounded(fn, *args):
    """Whether the first result is in half before it is returned."""
    settings = read_settings("mixed_bfloat16", (), True)
    plan, _ = plan_jaxpr(jax.make_jaxpr(fn)(*args), settings)
    return plan.out_states[0].is_low


@pytest.mark.parametrize("around", [lambda f: f, in_jit, in_calls, in_cond, in_dict])
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_the_returned_state_is_not_rounded(step, around):
    state = STATE if step in (retention, delta_rule) else HIDDEN
    assert not is_rounded(around(step), W, state, X)


@pytest.mark.parametrize("step", [average, retention, gated])
def test_the_returned_state_of_a_loop_is_not_rounded(step):
    state = STATE if step is retention else HIDDEN
    assert not is_rounded(in_loop(step), W, state, X)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_calls_are_as_accurate_as_one_loop(dtype):
    step = jax.jit(jaxmp.autocast(average, f"mixed_{dtype}"))
    actual = expected = HIDDEN
    plain = jax.jit(average)
    for _ in range(500):
        actual, _ = step(W, actual, X)
        expected, _ = plain(W, expected, X)
    np.testing.assert_allclose(actual, expected, atol=1e-2)
    assert np.abs(expected - HIDDEN).max() > 0.3


def test_a_cell_that_apply_policy_runs_keeps_its_state():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, h, x):
            h = 0.999 * h + 0.001 * nn.Dense(SIZE)(x)
            return h, h @ self.param("w", nn.initializers.lecun_normal(), (SIZE, SIZE))

    cell = jaxmp.apply_policy(Cell(), "mixed_bfloat16")
    params = cell.init(jax.random.key(0), HIDDEN, X)
    h, _ = jax.jit(cell.apply)(params, HIDDEN, X)
    assert bool(jnp.any(h != h.astype(jnp.bfloat16).astype(jnp.float32)))


def test_layers_of_a_network_stay_in_half():
    """Several layers that are applied to an input of its shape are no state."""

    def network(w, x):
        for _ in range(3):
            x = x + jax.nn.gelu(jax.nn.standardize(x @ w) @ w) @ w
        return x, x @ w

    assert is_rounded(network, W, X)


def test_a_state_that_is_replaced_is_an_ordinary_value():
    def step(w, h, x):
        h = jnp.where(h > 0, x @ w, h @ w)
        return h, h @ w

    assert is_rounded(step, W, HIDDEN, X)


def test_looking_for_states_uses_no_rule():
    """A body that is looked at without the scopes around it would match the path."""

    def step(w, h, x):
        with jax.named_scope("a"), jax.named_scope("b"):
            return jax.jit(named)(w, h, x)

    def named(w, h, x):
        with jax.named_scope("cell"):
            return average(w, h, x)

    rule = OpRule(path="cell", compute="float32")
    with pytest.raises(AutocastRuleError, match="matches no operation"):
        jaxmp.autocast(step, rules=[rule])(W, HIDDEN, X)
