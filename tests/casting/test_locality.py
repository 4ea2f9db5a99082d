"""What is decided about one operation decides nothing about the rest of a program.

One operation that stays in float32 is put into a network, at every place of it. The
matmuls of the network stay in half; the one that reads a cast to float32 directly
belongs to the cast.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import mlir
from jax.scipy import special

import jaxmp
from jaxmp.casting.explanation.shares import shares_of
from jaxmp.casting.planner._whole_function import plan_jaxpr, read_settings

BF16 = jnp.bfloat16
SIZE = 8
unknown_p = jex_core.Primitive("test_unknown_to_autocast")
unknown_p.def_impl(lambda x: x)
unknown_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(unknown_p, mlir.lower_fun(lambda x: x, False))


@jax.custom_vjp
def unscaled(x):
    return x / jnp.sqrt(jnp.mean(x * x) + 1e-6)


unscaled.defvjp(lambda x: (unscaled(x), ()), lambda _, g: (g,))


def square(x):
    """A well-conditioned square matrix of rows."""
    return x.T @ x / SIZE + jnp.eye(SIZE)


def in_float64(x, w):
    return lax.convert_element_type(x, jnp.float64).astype(jnp.float32) + 0 * w[:1]


def by_callback(x, w):
    del w
    return jax.pure_callback(lambda x: np.asarray(x), x, x)


def solved(x, w):
    return jnp.linalg.solve(jnp.eye(SIZE) + 0 * w, x.T).T


def by_gradient(x, w):
    """A force: the gradient of an energy goes on as a value."""
    return x - 0.1 * jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x)


def updated(x, w):
    """A model that is adapted before it is used."""
    w = w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return x @ w


def either(x, w):
    def cast(x):
        return x.astype(BF16).astype(jnp.float32) @ w

    return lax.cond(w[0, 0] > 0, cast, lambda x: x, x)


def counted(x, w):
    def body(state):
        i, x = state
        return i + 1, x * 0.5

    del w
    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def summed(x, w):
    def body(total, row):
        return total + row, total

    del w
    return lax.scan(body, jnp.zeros(SIZE), x)[1]


def conjugate(x, w):
    return jax.scipy.sparse.linalg.cg(lambda v: v + 0 * (v @ w), x, maxiter=2)[0]


OPERATIONS = {
    "unknown primitive": lambda x, w: unknown_p.bind(x),
    "callback": by_callback,
    "float64": in_float64,
    "complex": lambda x, w: (x * (1 + 0j)).real,
    "integers": lambda x, w: jnp.round(4 * x).astype(jnp.int32) / 4,
    "integer mask": lambda x, w: jnp.einsum("bd,d->bd", x, jnp.ones(SIZE, int)),
    "boolean mask": lambda x, w: lax.dot(x, jnp.eye(SIZE, dtype=bool)),
    "integer matmul": lambda x, w: x @ jnp.eye(SIZE, dtype=int),
    "precision": lambda x, w: jnp.dot(x, w, precision="highest"),
    "algorithm": lambda x, w: jnp.dot(x, w, precision="F32_F32_F32"),
    "float32 of half": lambda x, w: lax.dot(
        x.astype(BF16), w.astype(BF16), preferred_element_type=jnp.float32
    ),
    "cast and matmul": lambda x, w: x.astype(BF16).astype(jnp.float32) @ w,
    "cast, layout and matmul": lambda x, w: (
        (2 * x.astype(BF16).astype(jnp.float32)).T.reshape(x.shape) @ w
    ),
    "promoted": lambda x, w: x.astype(BF16) * w[:1],
    "promoted matmul": lambda x, w: x.astype(BF16) @ w,
    "two half dtypes": lambda x, w: x.astype(jnp.float16) + x.astype(BF16),
    "full_precision": lambda x, w: jaxmp.full_precision(lambda x: x @ w)(x),
    "full_precision jit": lambda x, w: jaxmp.full_precision(jax.jit(jnp.tanh))(x),
    "autocast inside": lambda x, w: jaxmp.autocast(lambda x: x @ w, "float32")(x),
    "special function": lambda x, w: special.gammainc(2.0, jnp.abs(x)),
    "special functions": lambda x, w: special.erfcx(x) + special.i0(x),
    "cholesky": lambda x, w: x @ lax.stop_gradient(jnp.linalg.cholesky(square(x))),
    "svd": lambda x, w: jnp.linalg.svd(x, full_matrices=False)[2][: len(x)],
    "solve": solved,
    "conjugate gradients": conjugate,
    "fft": lambda x, w: jnp.fft.ifft(jnp.fft.fft(x)).real,
    "sum over rows": summed,
    "loop without a matmul": counted,
    "branches": either,
    "a gradient": by_gradient,
    "an updated weight": updated,
    "custom_vjp": lambda x, w: unscaled(x),
    "norm": lambda x, w: jax.nn.standardize(x),
    "softmax": lambda x, w: jax.nn.softmax(x),
    "cumulative sum": lambda x, w: jnp.cumsum(x, -1),
    "sort": lambda x, w: jnp.sort(x),
    "unfit constant": lambda x, w: jnp.where(x > 1e30, x, x * 1e-30 * 1e30),
    "random draw": lambda x, w: x + jax.random.normal(jax.random.key(0), x.shape),
    "reduce_precision": lambda x, w: lax.reduce_precision(x, 8, 10),
    "bits": lambda x, w: lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int32), jnp.float32
    ),
    "checkpoint": lambda x, w: jax.checkpoint(jnp.sin)(x),
}
INSIDE_JAX = {"solve": ("precision=HIGHEST",)}
"""What JAX itself asks for, in the gradient of one of its functions."""
NOT_DIFFERENTIABLE = {
    "unknown primitive",
    "callback",
    "svd",
    "conjugate gradients",
    "loop without a matmul",
}


def plain(x, w):
    return jnp.tanh(x @ w)


def residual(x, w):
    return x + jax.nn.relu(jax.nn.standardize(x) @ w) @ w


def attention(x, w):
    return x + jax.nn.softmax(x @ w @ x.T) @ x @ w


def layers(inside):
    def block(x, w):
        return lax.scan(lambda x, _: (inside(x, w), None), x, length=3)[0]

    return block


def network(blocks, w, x):
    for block in blocks:
        x = block(x, w)
    return jnp.sum(jnp.square(x @ w))


def places(operation):
    """Networks with an operation before, between and inside of their blocks."""
    blocks = [plain, residual, attention, jax.checkpoint(residual), layers(plain)]
    for i in range(len(blocks) + 1):
        yield [*blocks[:i], operation, *blocks[i:]]

    def then_plain(x, w):
        return plain(operation(x, w), w)

    def then_residual(x, w):
        return residual(x, w) + operation(plain(x, w), w)

    yield [plain, jax.jit(then_plain), plain]
    yield [plain, then_residual, then_residual, plain]
    yield [plain, layers(then_plain), plain]
    yield [plain, layers(then_residual), plain]


ARGUMENTS = (jnp.ones((SIZE, SIZE)) / SIZE, jnp.ones((SIZE, SIZE)))


def moved(x, w):
    """An operation that is no more than a move of its operand."""
    return lax.rev(x, (0,)) + 0 * w[:1]


def shares(operation, transform=lambda fn: fn, every=1):
    settings = read_settings("mixed_bfloat16", (), True)
    for blocks in itertools.islice(places(operation), 0, None, every):
        fn = transform(functools.partial(network, blocks))
        yield shares_of(plan_jaxpr(jax.make_jaxpr(fn)(*ARGUMENTS), settings)[0])


def gradient(fn):
    return jax.grad(fn, (0, 1))


@functools.cache
def shares_without():
    return list(shares(moved))


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_operation_leaves_the_others_in_half(name):
    with jax.enable_x64(name == "float64"):
        found = shares(OPERATIONS[name])
        for i, (bare, actual) in enumerate(zip(shares_without(), found, strict=True)):
            assert bare.share == 1.0
            assert actual.half >= bare.half, (i, actual)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - NOT_DIFFERENTIABLE))
def test_one_operation_leaves_the_gradients_of_the_others_in_half(name):
    """A matmul has two more in its gradient: no others may stay in float32."""
    with jax.enable_x64(name == "float64"):
        transforms = (lambda fn: fn, gradient)
        forward, both = (shares(OPERATIONS[name], f, every=3) for f in transforms)
        for i, (own, actual) in enumerate(zip(forward, both, strict=True)):
            allowed = 3 * (own.total - own.half)
            by_jax = (
                r.flops for r in actual.reasons if r.reason in INSIDE_JAX.get(name, ())
            )
            inside_jax = sum(by_jax)
            assert actual.total - actual.half - inside_jax <= allowed, (i, actual)


def test_a_call_that_updates_a_sum_elsewhere_is_half_here():
    """JAX traces one function once, for the loop that adds up and for others."""
    added = jax.jit(lambda x, y: x + y)

    def half_adds(with_sum):
        def fn(w, x):
            y = added((x @ w).T, x @ w) @ w
            return (y, summed_up(w, x)) if with_sum else y

        def summed_up(w, x):
            def step(h, row):
                h = added(h, row)
                return h, h @ w

            return lax.scan(step, jnp.zeros((SIZE, SIZE)), jnp.stack([x, x]))

        rows = jaxmp.explain(fn)(*ARGUMENTS).rows
        calls = [row.after for row in rows if row.operation.startswith("jit")]
        return calls[0]

    assert half_adds(True) == half_adds(False) == "bf16 bf16 -> bf16"


@pytest.mark.parametrize("name", ["unknown primitive", "solve", "callback"])
def test_what_is_bound_whole_does_not_come_from_outside(name):
    """A product without a sum is float32 only of what does."""

    def fn(x, w):
        h = jax.jit(OPERATIONS[name])(x @ w, w)
        return jnp.einsum("bi,bj->bij", h, h)

    rows = jaxmp.explain(fn)(*ARGUMENTS).only("matmuls").rows
    assert rows[-1].after == "bf16 bf16 -> bf16"


def test_the_gradient_of_a_weight_that_meets_one_vector_is_half():
    def fn(x, w):
        return jax.grad(lambda w: jnp.sum(unknown_p.bind(x[0]) @ w))(w)

    rows = jaxmp.explain(fn)(*ARGUMENTS).only("matmuls").rows
    assert [row.after for row in rows] == ["bf16 bf16 -> bf16"] * len(rows)
