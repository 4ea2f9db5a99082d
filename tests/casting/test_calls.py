"""Calls under autocast: what they are called with stays, what is inside is planned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.ode import odeint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import AutocastError
from jaxmp.testing import equations, matmuls
from tests.support.functions import example_arguments

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
W, X = example_arguments()


def dense(w, x):
    return jnp.tanh(x @ w).sum()


def only(fn, *names, args=(W, X)):
    """The one equation of these names in what autocast makes of a function."""
    jaxpr = jax.make_jaxpr(jaxmp.autocast(fn))(*args)
    (found,) = (e for _, e in equations(jaxpr) if e.primitive.name in names)
    return found


def all_devices():
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("i",), axis_types=kinds)


def replicated():
    return NamedSharding(all_devices(), P())


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"donate_argnums": 1}, "donated_invars"),
        ({"inline": True}, "inline"),
        ({"keep_unused": True}, "keep_unused"),
        ({"in_shardings": replicated}, "in_shardings"),
        ({"out_shardings": replicated}, "out_shardings"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_jit_inside_keeps_how_it_is_called(options, parameter):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    inner = jax.jit(dense, **options)

    def fn(w, x):
        return inner(w, x) * 2

    def calls(jaxpr):
        return [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]

    before = jax.make_jaxpr(fn)(W, X)
    after = jax.make_jaxpr(jaxmp.autocast(fn))(W, X)
    # Some releases of JAX inline at once.
    assert len(calls(after)) == len(calls(before)) >= (parameter != "inline")
    for old, new in zip(calls(before), calls(after), strict=True):
        assert new.params["name"] == "dense"
        assert new.params[parameter] == old.params[parameter]
    assert {d for m in matmuls(after) for d in m.operands} == {BF16}


def test_a_sharding_inside_is_kept():
    sharding = replicated()

    def fn(w, x):
        return (lax.with_sharding_constraint(x @ w, sharding) @ w.T).sum()

    found = only(fn, "sharding_constraint")
    assert found.params["sharding"] == sharding
    assert found.invars[0].aval.dtype == BF16
    grads = jax.jit(jax.grad(jaxmp.autocast(fn)))(W, X)
    np.testing.assert_allclose(grads, jax.grad(fn)(W, X), atol=0.1)


def test_shardings_of_arguments_reach_the_output():
    rows = NamedSharding(all_devices(), P("i"))
    x = jax.device_put(jnp.ones((16, W.shape[0])), rows)
    out = jax.jit(jaxmp.autocast(lambda w, x: x @ w))(W, x)
    assert out.sharding.is_equivalent_to(rows, 2)


def test_donated_arguments_are_donated():
    step = jax.jit(
        jaxmp.autocast(lambda w, x: w - 0.1 * (x.T @ (x @ w))), donate_argnums=0
    )
    text = step.lower(W, X).as_text()
    assert "jax.buffer_donor" in text or "tf.aliasing_output" in text


@pytest.mark.parametrize("solver", ["cg", "bicgstab", "gmres"])
def test_linear_solves_are_float32_inside(solver):
    solve = getattr(jax.scipy.sparse.linalg, solver)
    a = jnp.eye(4) * 3 + 0.1 * jnp.ones((4, 4))

    def fn(a, x):
        b = (x @ a).sum(0)
        return solve(lambda v: a @ v, b, tol=1e-6)[0]

    x = jnp.arange(8.0).reshape(2, 4) / 8
    cast = jax.jit(jaxmp.autocast(fn))
    b = jaxmp.autocast(lambda a, x: (x @ a).sum(0))(a, x)
    # The right-hand side is rounded; its solution is not.
    np.testing.assert_allclose(a @ cast(a, x), b, rtol=1e-4)
    expected = jax.grad(lambda a: fn(a, x).sum())(a)
    actual = jax.grad(lambda a: cast(a, x).sum())(a)
    np.testing.assert_allclose(actual, expected, atol=0.02)


def test_foreign_calls_see_their_own_dtypes():
    def fn(w, x):
        call = jax.ffi.ffi_call("a_target", jax.ShapeDtypeStruct(X.shape, F32))
        return call(x @ w.T @ w) @ w

    found = only(fn, "ffi_call")
    assert found.invars[0].aval.dtype == found.outvars[0].aval.dtype == F32


@pytest.mark.parametrize("inner", [jax.jvp, jax.vjp, jax.linearize])
def test_derivatives_that_the_function_takes_itself(inner):
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))

    @jax.custom_jvp
    def triple(x):
        return 3 * x

    triple.defjvp(lambda x, t: (3 * x[0], 3 * t[0]))

    def fn(w, x):
        act = triple if inner is not jax.vjp else lambda x: double(triple(x))

        def f(w):
            return jnp.sum(act(x @ w) ** 2)

        if inner is jax.jvp:
            return jax.jvp(f, (w,), (w,))[1]
        if inner is jax.vjp:
            return jax.vjp(f, w)[1](1.0)[0]
        return jax.linearize(f, w)[1](w)

    expected = fn(W, X)
    scale = float(jnp.abs(expected).max())
    actual = jaxmp.autocast(fn)(W, X)
    np.testing.assert_allclose(actual / scale, expected / scale, atol=0.03)


def test_ragged_matmuls_are_in_half():
    sizes = jnp.array([3, 2, 1], jnp.int32)
    w, x = jnp.ones((3, 4, 5)), jnp.ones((6, 4))

    def fn(w, x):
        return lax.ragged_dot(x, w, sizes).sum()

    jaxpr = jax.make_jaxpr(jax.grad(jaxmp.autocast(fn), (0, 1)))(w, x)
    names = ("ragged_dot", "ragged_dot_general")
    found = [e for _, e in equations(jaxpr) if e.primitive.name in names]
    floats = [v.aval.dtype for e in found for v in e.invars if v.aval.dtype != "int32"]
    assert len(found) == 3
    assert set(floats) == {BF16}


@pytest.mark.parametrize("outer", ["checkpoint", "jit", "vmap", "scan"])
def test_autocast_inside_of_other_transformations(outer):
    cast = jaxmp.autocast(dense)
    wrapped = {
        "checkpoint": jax.checkpoint(cast),
        "jit": jax.jit(cast),
        "vmap": lambda w, x: jax.vmap(cast, (None, 0))(w, x[None]).sum(),
        "scan": lambda w, x: lax.scan(
            lambda c, x: (c + cast(w, x), None), 0.0, x[None]
        )[0],
    }[outer]
    expected = jax.grad(dense)(W, X)
    scale = float(jnp.abs(expected).max())
    actual = jax.grad(wrapped)(W, X)
    assert actual.dtype == F32
    np.testing.assert_allclose(actual / scale, expected / scale, atol=0.03)


def test_a_policy_of_checkpoint_is_kept():
    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    )
    def layer(w, x):
        return jax.nn.gelu(x @ w)

    def fn(w, x):
        return (layer(w, x) @ w.T).sum()

    jaxpr = jax.make_jaxpr(jaxmp.autocast(fn))(W, X)
    (found,) = (e for _, e in equations(jaxpr) if e.params.get("policy"))
    assert found.params["policy"] is jax.checkpoint_policies.dots_saveable
    assert found.params["prevent_cse"] is False


def test_custom_derivatives_that_close_over_what_has_a_gradient_are_refused():
    """As under jit: a gradient of zero would be wrong."""

    def fn(x):
        scaled = jax.custom_vjp(lambda y: y @ (x.T @ x))
        scaled.defvjp(lambda y: (jnp.tanh(y), None), lambda _, dy: (dy,))
        return jnp.sum(scaled(x))

    with pytest.raises(AutocastError, match="closes over a value that has a gradient"):
        jax.jit(jax.grad(jaxmp.autocast(fn)))(X)


def test_differential_equations_of_jax():
    """Their custom derivative closes over constants that are made inside of it."""

    def loss(w):
        times = jnp.linspace(0.0, 1.0, 3)
        return jnp.sum(odeint(lambda y, t, w: jnp.tanh(y @ w), X, times, w) ** 2)

    expected = jax.jit(jax.grad(loss))(W)
    actual = jax.jit(jax.grad(jaxmp.autocast(loss)))(W)
    assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)


def by_callback(x):
    return jax.pure_callback(np.asarray, x, x)


def by_while(x):
    return lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x / 2, x)


@pytest.mark.parametrize("call", [by_callback, by_while])
def test_what_reads_a_stopped_gradient_needs_none(call):
    """Neither callbacks nor `while` loops have a gradient for one of zeros."""

    @jax.checkpoint
    def block(w, x):
        h = jnp.tanh(2 * (x @ w))
        return h * call(lax.stop_gradient(h))

    def loss(w, x):
        return jnp.sum(block(w, x))

    found, expected = (jax.grad(fn)(W, X) for fn in (jaxmp.autocast(loss), loss))
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("transform", [lambda fn: fn, jaxmp.full_precision])
def test_a_call_that_returns_nothing(transform):
    def fn(w, x):
        h = jnp.tanh(x @ w)
        transform(jax.jit(lambda h: None))(h)
        return h @ w

    assert jaxmp.autocast(fn)(W, X).shape == fn(W, X).shape


def refusing_vjp(w, x, table):
    """A rule that is written for a gradient of its first operand alone."""

    @jax.custom_vjp
    def scaled(w, x, table):
        return x @ w, jnp.sum(table)

    def forward(w, x, table):
        assert w.perturbed
        assert not x.perturbed
        assert not table.perturbed
        return scaled(w.value, x.value, table.value), x.value

    def backward(x, cotangents):
        return x.T @ cotangents[0], None, None

    scaled.defvjp(forward, backward, symbolic_zeros=True)
    return scaled(w, x, table)[0]


def refusing_jvp(w, x, table):
    @jax.custom_jvp
    def scaled(w, x, table):
        return x @ w * jnp.sum(table)

    def rule(primals, tangents):
        _, x, table = primals
        assert all(isinstance(t, SymbolicZero) for t in tangents[1:])
        return scaled(*primals), x @ tangents[0] * jnp.sum(table)

    scaled.defjvp(rule, symbolic_zeros=True)
    return scaled(w, x, table)


def in_scan(fn):
    def scanned(w, x, table):
        return lax.scan(lambda y, _: (fn(w, x, table) + 0 * y, None), x, length=2)[0]

    return scanned


@pytest.mark.parametrize(
    "around",
    [lambda fn: fn, jax.jit, jax.checkpoint, in_scan],
    ids=["plain", "jit", "checkpoint", "scan"],
)
@pytest.mark.parametrize("call", [refusing_vjp, refusing_jvp])
def test_a_rule_is_asked_for_no_more_than_without_autocast(call, around):
    """Rules may refuse what they are not written for, as those of Diffrax do."""

    def loss(w, x):
        table = jnp.arange(4.0) / 6
        return jnp.sum(jnp.tanh(around(call)(w, x, table)) ** 2)

    expected = jax.jit(jax.grad(loss))(W, X)
    for transform in (lambda g: g, jax.jit):
        actual = transform(jax.grad(jaxmp.autocast(loss)))(W, X)
        assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)
    assert jaxmp.explain(loss)(W, X).half_flops == 1.0


def test_a_rule_is_planned_for_each_set_of_gradients():
    @jax.custom_vjp
    def product(w, x):
        return jnp.tanh(x @ w)

    product.defvjp(
        lambda w, x: (product(w, x), (w, x)),
        lambda kept, dy: (kept[1].T @ dy, dy @ kept[0].T),
    )

    def loss(w, x):
        return jnp.sum(product(w, lax.stop_gradient(x)) + product(W, x))

    for argnums in (0, 1, (0, 1)):
        expected = jax.grad(loss, argnums)(W, X)
        actual = jax.grad(jaxmp.autocast(loss), argnums)(W, X)
        for a, e in zip(
            jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
        ):
            assert np.linalg.norm(a - e) < 0.02 * np.linalg.norm(e)
