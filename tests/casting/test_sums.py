"""A sum stays a sum: what a loop updates as `a * old + increment` is float32.

Whoever reads it; and the layers of a network, whose residual stream is a sum as well,
stay in half.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

import jaxmp
from jaxmp.testing import equations

STEPS, SIZE = 512, 8
KEYS = jax.random.split(jax.random.key(0), 6)
W = jax.random.normal(KEYS[0], (SIZE, SIZE)) / SIZE**0.5
Q, K, V = (jax.random.normal(key, (STEPS, SIZE)) for key in KEYS[1:4])
F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def linear_attention(w, loop):
    k, q = jax.nn.softplus(K @ w), jax.nn.softplus(Q @ w)

    def step(carry, x):
        state, total = carry
        q, k, v = x
        state, total = state + jnp.outer(k, v), total + k
        return (state, total), (q @ state) / (q @ total)

    init = jnp.zeros((SIZE, SIZE)), jnp.zeros(SIZE)
    return loop(step, init, (q, k, V))


def delta_rule(w, loop):
    k = K @ w
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)

    def step(state, x):
        q, k, v = x
        state = state + 0.5 * jnp.outer(k, v - k @ state)
        return state, q @ state

    return loop(step, jnp.zeros((SIZE, SIZE)), (Q @ w, k, V))


def integrator(w, loop):
    def step(h, x):
        h = 0.999 * h + 0.001 * (1 + x)
        return h, h @ w

    return loop(step, jnp.zeros(SIZE), V @ w)


def state_space(w, loop):
    """Selective: the decay is computed from the input."""
    decay = jnp.exp(-0.01 * jax.nn.softplus(K @ w))

    def step(h, x):
        a, b = x
        h = a * h + (1 - a) * b
        return h, h @ w

    return loop(step, jnp.zeros(SIZE), (decay, 1 + V @ w))


def small_steps(w, loop):
    def step(x, v):
        x = x + 0.01 * jnp.tanh(x @ w + v)
        return x, x @ w

    return loop(step, jnp.ones(SIZE), V)


RECURRENCES = [linear_attention, delta_rule, integrator, state_space, small_steps]


def scan(step, init, xs):
    return lax.scan(step, init, xs)[1]


def nested(step, init, xs):
    """A scan of scans."""
    xs = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), xs)
    ys = lax.scan(lambda carry, xs: lax.scan(step, carry, xs), init, xs)[1]
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def in_calls(step, init, xs):
    return lax.scan(jax.checkpoint(jax.jit(step)), init, xs)[1]


def batched(step, init, xs):
    xs = jax.tree.map(lambda x: jnp.stack([x, x]), xs)
    return jax.vmap(lambda xs: lax.scan(step, init, xs)[1])(xs)[0]


def masked(step, init, xs):
    """Steps that are padding change nothing."""

    def either(carry, x):
        new, y = step(carry, x)
        is_padding = jnp.sum(x[0] if isinstance(x, tuple) else x) > 1e3
        return jax.tree.map(lambda a, b: jnp.where(is_padding, a, b), carry, new), y

    return lax.scan(either, init, xs)[1]


def branched(step, init, xs):
    def either(carry, x):
        is_padding = jnp.sum(x[0] if isinstance(x, tuple) else x) > 1e3
        _, shape = jax.eval_shape(step, carry, x)

        def skip(carry, x):
            return carry, jnp.zeros(shape.shape)

        return lax.cond(is_padding, skip, step, carry, x)

    return lax.scan(either, init, xs)[1]


def by_while(step, init, xs):
    """Only the last result, of a loop whose length nobody knows."""
    x0 = jax.tree.map(lambda x: x[0], xs)
    _, y0 = jax.eval_shape(step, init, x0)

    def body(state):
        i, carry, _ = state
        carry, y = step(carry, jax.tree.map(lambda x: x[i], xs))
        return i + 1, carry, y

    state = 0, init, jnp.zeros(y0.shape)
    return lax.while_loop(lambda state: state[0] < STEPS, body, state)[2]


# As of a library: nothing is known of it but that it runs.
_chosen = Primitive("chosen_by_a_library")
_chosen.def_abstract_eval(lambda pred, x, y: x)


def chosen_by_library(step, init, xs):
    """The new state goes through a primitive that autocast does not know."""

    def either(carry, x):
        new, y = step(carry, x)
        is_done = jnp.sum(x[0] if isinstance(x, tuple) else x) > 1e3
        return jax.tree.map(lambda a, b: _chosen.bind(is_done, a, b), carry, new), y

    return lax.scan(either, init, xs)[1]


LOOPS = [
    scan,
    nested,
    in_calls,
    batched,
    masked,
    branched,
    by_while,
    chosen_by_library,
]


def loops(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args)
    return [e for _, e in equations(jaxpr) if e.primitive.name in ("scan", "while")]


def carries(eqn):
    if eqn.primitive.name == "while":
        return [v.aval for v in eqn.outvars]
    count = len(eqn.params["jaxpr"].out_avals) - sum(
        v.aval.shape[:1] == (eqn.params["length"],) for v in eqn.outvars
    )
    return [v.aval for v in eqn.outvars[:count]]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda f: f.__name__)
def test_what_is_summed_is_carried_in_float32(recurrence, loop):
    fn = functools.partial(recurrence, loop=loop)
    for eqn in loops(jaxmp.autocast(fn), W):
        assert BF16 not in [aval.dtype for aval in carries(eqn)], eqn


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda f: f.__name__)
def test_sums_are_as_accurate_as_the_matmuls_that_read_them(recurrence):
    def loss(w):
        y = recurrence(w, scan)
        return jnp.mean(y * y), y

    grad = jax.value_and_grad(loss, has_aux=True)
    cast = jax.value_and_grad(jaxmp.autocast(loss), has_aux=True)
    (_, expected), expected_grad = jax.jit(grad)(W)
    (_, actual), actual_grad = jax.jit(cast)(W)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=0.01)
    distance = np.linalg.norm(actual_grad - expected_grad)
    assert distance < 0.02 * np.linalg.norm(expected_grad)


def norm(x):
    return jax.nn.standardize(x) * 1.1 + 0.1


def rms(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def mlp(x, w):
    return jax.nn.gelu(x @ w) @ w.T


def attention(x, w):
    return jax.nn.softmax((x @ w) @ (x @ w).T) @ x @ w


def dropped(x):
    keep = jax.random.bernoulli(jax.random.key(1), 0.9, x.shape)
    return jnp.where(keep, x / 0.9, 0.0)


def post_norm(x, w):
    x = norm(x + attention(x, w))
    return norm(x + mlp(x, w))


def pre_norm(x, w):
    x = x + attention(norm(x), w)
    return x + mlp(norm(x), w)


BLOCKS = {
    "pre-norm": pre_norm,
    "post-norm": post_norm,
    "deep norm": lambda x, w: norm(2.2 * x + mlp(x, w)),
    "rms norm": lambda x, w: x + mlp(rms(x), w) * (rms(x) @ w),
    "parallel": lambda x, w: x + attention(norm(x), w) + mlp(norm(x), w),
    "sandwich": lambda x, w: x + norm(mlp(norm(x), w)),
    "dropout": lambda x, w: x + dropped(mlp(norm(x), w)),
    "layer scale": lambda x, w: x + 1e-4 * mlp(norm(x), w),
    "rezero": lambda x, w: x + w[0, 0] * mlp(x, w),
    "activated": lambda x, w: jax.nn.relu(x + jax.nn.relu(x @ w) @ w),
    "linear attention": lambda x, w: x + (x @ w) @ ((x @ w).T @ norm(x)) / STEPS,
    "gain of 1": lambda x, w: 1.0 * x + mlp(norm(x), w),
    "clipped": lambda x, w: jnp.clip(x + mlp(norm(x), w), -10, 10),
}


def layers(block, w, count=12):
    ws = jnp.broadcast_to(w, (count, *w.shape))
    return lax.scan(lambda x, w: (block(x, w), None), V @ w, ws)[0]


def streams(name, transform):
    def loss(w):
        return jnp.sum(layers(BLOCKS[name], w) @ w)

    found = loops(jaxmp.autocast(transform(loss)), W)
    return [a.dtype for eqn in found for a in carries(eqn) if a.shape == V.shape]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_residual_stream_of_a_few_layers_is_in_half(name):
    assert streams(name, lambda loss: loss) == [BF16]


@pytest.mark.parametrize("name", ["pre-norm", "sandwich", "layer scale"])
def test_the_gradients_of_a_few_layers_are_in_half(name):
    assert set(streams(name, jax.grad)) == {BF16}


def test_a_normed_sum_of_small_steps_is_a_sum():
    """A norm does not make layers of what it norms."""

    def fn(w):
        def step(h, x):
            h = rms(h + 0.001 * x)
            return h, h @ w

        return lax.scan(step, jnp.ones(SIZE), V[:64])[1]

    (eqn,) = loops(jaxmp.autocast(fn), W)
    assert [aval.dtype for aval in carries(eqn)] == [F32]


def test_a_hidden_state_that_is_replaced_is_in_half():
    def lstm(w):
        def cell(carry, x):
            c, h = carry
            gate = jax.nn.sigmoid(x @ w + h @ w)
            c = gate * c + (1 - gate) * jnp.tanh(x @ w)
            h = gate * jnp.tanh(c)
            return (c, h), h

        zeros = jnp.zeros(SIZE)
        return lax.scan(cell, (zeros, zeros), V)[1] @ w

    (eqn,) = loops(jaxmp.autocast(lstm), W)
    assert [v.dtype for v in carries(eqn)] == [F32, BF16]


def test_the_results_of_each_step_are_rounded_for_their_readers_only():
    """The states of a recurrence that a matmul reads later are stored in half."""

    def fn(w):
        def step(h, x):
            h = 0.9 * h + 0.1 * (x @ w)
            return h, h

        return lax.scan(step, jnp.zeros(SIZE), V)[1] @ w

    (eqn,) = loops(jaxmp.autocast(fn), W)
    assert [v.aval.dtype for v in eqn.outvars] == [F32, BF16]


def test_what_a_statistic_of_the_sum_is_added_to_is_a_sum():
    def fn(w):
        def body(state):
            i, h = state
            return i + 1, h + 0.001 * jax.nn.logsumexp(h @ w) + 0.001 * jnp.max(h)

        return lax.while_loop(lambda state: state[0] < STEPS, body, (0, V[0]))[1] @ w

    def centred(w):
        def step(h, x):
            h = h + 0.001 * jnp.mean(h)
            return h, h @ w

        return lax.scan(step, V[0], V)[1]

    for recurrence in (fn, centred):
        (eqn,) = loops(jaxmp.autocast(recurrence), W)
        assert BF16 not in [aval.dtype for aval in carries(eqn)]


def test_loops_of_one_body_and_two_lengths_are_decided_each_by_itself():
    """JAX traces the body once for both."""

    def step(h, x):
        return h + 0.01 * (jnp.tanh(h @ W + x) @ W), None

    def few(w):
        return lax.scan(step, V[0] @ w, V[:12])[0] @ w

    def both(w):
        return few(w), lax.scan(step, V[0] @ w, V)[0] @ w

    carried = [
        aval.dtype for eqn in loops(jaxmp.autocast(both), W) for aval in carries(eqn)
    ]
    assert carried == [BF16, F32]
    rows = [
        [(row.operation, row.after, row.reason) for row in jaxmp.explain(fn)(W).rows]
        for fn in (few, both)
    ]
    assert rows[1][: len(rows[0])] == rows[0]
