"""Programs that a naive cast to half breaks, and what autocast makes of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.testing import equations, matmuls
from tests.support.functions import example_arguments

BF16 = jnp.dtype(jnp.bfloat16)
F32 = jnp.dtype(jnp.float32)
W, X = example_arguments()


def operands(fn, *args, **options):
    found = matmuls(jax.make_jaxpr(jaxmp.autocast(fn, **options))(*args))
    return {dtype for m in found for dtype in m.operands}


def scan_of(fn, *args):
    jaxpr = jax.make_jaxpr(jaxmp.autocast(fn))(*args)
    return next(e for _, e in equations(jaxpr) if e.primitive.name == "scan")


def test_a_carry_leaves_a_loop_in_the_dtype_it_entered():
    def fn(w, x):
        def body(carry, _):
            h, total = carry
            h = h + jnp.tanh(h @ w)
            return (h, total + h.mean()), None

        return lax.scan(body, (x, 0.0), None, length=4, reverse=True, unroll=2)[0]

    scan = scan_of(fn, W, X)
    assert [v.aval.dtype for v in scan.outvars] == [BF16, F32]
    assert scan.params["reverse"]
    assert scan.params["unroll"] == 2
    assert scan.params["length"] == 4
    outs = jaxmp.autocast(fn)(W, X)
    assert [x.dtype for x in outs] == [F32, F32]


def test_weights_that_a_loop_trains_stay_float32():
    def fn(w, x):
        def step(w, _):
            return w - 1e-3 * jax.grad(lambda w: ((x @ w - 1) ** 2).mean())(w), None

        return lax.scan(step, w, None, length=5)[0]

    assert scan_of(fn, W, X).outvars[0].aval.dtype == F32
    np.testing.assert_allclose(jaxmp.autocast(fn)(W, X), fn(W, X), atol=1e-4)


def test_branches_agree_in_their_dtypes():
    def fn(i, w, x):
        branches = [lambda x: x @ w, jax.nn.softmax, lambda x: x, jnp.zeros_like]
        return lax.switch(i, branches, x) @ w

    for i in range(4):
        cast = jax.jit(jaxmp.autocast(fn))
        np.testing.assert_allclose(cast(i, W, X), fn(i, W, X), atol=0.05)


def test_a_wrong_cotangent_is_reported_under_the_name_of_the_function():
    @jax.custom_vjp
    def my_matmul(x, w):
        return x @ w

    my_matmul.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda res, g: ((g @ res[1].T)[:1], res[0].T @ g),
    )
    cast = jaxmp.autocast(lambda w: my_matmul(X, w).sum())
    with pytest.raises(ValueError, match="my_matmul"):
        jax.grad(cast)(W)


@pytest.mark.parametrize("name", ["dots_saveable", "save_only_these_names"])
def test_a_checkpoint_keeps_its_policy_and_residuals_are_half(name):
    policy = getattr(jax.checkpoint_policies, name)
    policy = policy("h") if name.startswith("save_only") else policy

    def block(w, x):
        h = jax.ad_checkpoint.checkpoint_name(jnp.tanh(x @ w), "h")
        return x + h @ w

    def fn(w, x):
        return jax.checkpoint(block, policy=policy)(w, x @ w) @ w

    jaxpr = jax.make_jaxpr(jaxmp.autocast(fn))(W, X)
    regions = [e for _, e in equations(jaxpr) if e.primitive.name == "remat2"]
    assert policy in [e.params["policy"] for e in regions]
    _, vjp = jax.vjp(jaxmp.autocast(fn), W, X)
    kept = {x.dtype for x in jax.tree.leaves(vjp) if x.shape == (4, 8)}
    assert kept <= {BF16}


def test_int8_complex_and_float64_are_untouched():
    a = jnp.ones((4, 4), jnp.int8)
    c = jnp.ones((4, 4), jnp.complex64)
    dot = jaxmp.autocast(lambda a: lax.dot(a, a, preferred_element_type=jnp.int32))
    assert dot(a).dtype == jnp.int32
    assert jaxmp.autocast(lambda c: c @ c)(c).dtype == jnp.complex64
    with jax.enable_x64(True):
        d = jnp.ones((4, 4), jnp.float64)
        assert operands(lambda d: d @ d, d) == {jnp.dtype("float64")}


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: jnp.dot(x, w, precision="highest"),
        lambda x, w: jaxmp.full_precision(lambda x, w: jnp.tanh(x @ w))(x, w),
        lambda x, w: x.astype(jnp.bfloat16).astype(jnp.float32) @ w,
        lambda x, w: lax.dot(
            x.astype(jnp.bfloat16),
            w.astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        ),
    ],
    ids=["precision", "full_precision", "cast", "float32 result"],
)
def test_float32_that_the_program_asks_for_wins(fn):
    np.testing.assert_array_equal(jaxmp.autocast(fn)(X, W), jax.jit(fn)(X, W))


def test_a_cast_that_changes_no_dtype_is_invisible():
    assert operands(lambda x, w: x.astype(jnp.float32) @ w, X, W) == {BF16}


def test_kernels_and_callbacks_run_once_in_their_own_dtypes():
    seen = []

    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def fn(x, w):
        y = x @ w
        shape = jax.ShapeDtypeStruct(y.shape, jnp.float32)
        y = pl.pallas_call(double, out_shape=shape, interpret=True)(y)
        y = jax.pure_callback(lambda a: np.asarray(a) + np.float32(1), shape, y)
        jax.debug.callback(lambda a: seen.append(a.dtype), y)
        return y @ w

    actual = jaxmp.autocast(fn)(X, W)
    jax.effects_barrier()
    assert seen == [np.float32]
    np.testing.assert_allclose(actual, fn(X, W), atol=0.2)


@pytest.mark.devices(8)
def test_sums_over_devices_are_float32():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(x, w):
        return lax.psum((x @ w).sum(), "i"), lax.pmean(x @ w, "i")

    specs = {"in_specs": (P("i"), P()), "out_specs": (P(), P())}
    fn = jax.shard_map(fn, mesh=mesh, **specs)
    x = jnp.full((8, 1), 2e4)
    actual = jax.jit(jaxmp.autocast(fn, "mixed_float16"))(x, jnp.ones((1, 1)))
    assert actual[0] == 160000


def test_two_policies_on_one_function_give_two_programs():
    results = {
        str(jaxmp.get_policy(p)): jax.jit(jaxmp.autocast(lambda x, w: x @ w, p))(X, W)
        for p in ("float32", "mixed_bfloat16", "mixed_float16")
    }
    assert len({np.asarray(r).tobytes() for r in results.values()}) == 3
    cast = jaxmp.autocast(lambda x, w: x @ w, output_dtype="bfloat16")
    assert cast(X, W).dtype == BF16


@pytest.mark.parametrize(
    "fn",
    [
        lambda p: jnp.log(p @ p + 1e-9),
        lambda p: (p @ p) / (jnp.abs(p @ p).max() + 1e-8) @ p,
        lambda p: jnp.where(p @ p > 0, p @ p, -1e9) * 0.0 + p @ p,
    ],
)
def test_constants_that_float16_cannot_hold_give_finite_results(fn):
    assert np.isfinite(jaxmp.autocast(fn, "mixed_float16")(jnp.zeros((2, 2)))).all()


def test_an_rms_norm_of_300_does_not_overflow_in_float16():
    def norm(x):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    x, eye = jnp.full((2, 4), 300.0), jnp.eye(4)
    for fn in (norm, lambda x: norm(x @ eye), lambda x: norm(x @ eye) @ eye):
        actual = jaxmp.autocast(fn, "mixed_float16")(x)
        np.testing.assert_allclose(actual, 1.0, rtol=0.01)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.GroupNorm, nn.BatchNorm])
@pytest.mark.parametrize("fast", [True, False])
def test_a_cancelling_variance_is_noted_and_left_as_in_float32(norm, fast):
    options = {"use_running_average": False} if norm is nn.BatchNorm else {}
    options |= {"num_groups": 2} if norm is nn.GroupNorm else {}
    layer = norm(use_fast_variance=fast, **options)
    x = 4 + 0.5 * jax.random.normal(jax.random.key(0), (4, 8))
    variables = layer.init(jax.random.key(1), x)

    def apply(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])[0]

    rows = jaxmp.explain(apply)(variables, x).rows
    noted = [row.operation for row in rows if "cancels" in row.reason]
    assert noted == (["sub"] if fast else [])
    # What autocast makes of it is what float32 makes of it, right or wrong.
    np.testing.assert_allclose(
        jaxmp.autocast(apply)(variables, x), jax.jit(apply)(variables, x), atol=1e-3
    )


def test_long_sums_lose_no_addend():
    ids = jnp.zeros(1000, int)
    grad = jax.grad(
        jaxmp.autocast(lambda table: (table[ids] @ jnp.ones((2, 1))).sum())
    )(jnp.zeros((4, 2)))
    np.testing.assert_array_equal(grad[0], 1000)
    total = jaxmp.autocast(lambda x: lax.scan(lambda c, x: (c + x, None), 0.0, x)[0])
    assert total(jnp.ones(5000)) == 5000


def test_cotangents_of_a_weight_are_summed_in_float32():
    def scanned(w):
        xs = jnp.full((5000, 1, 1), 0.25)
        return lax.scan(lambda c, x: (c + (x @ w).sum(), None), 0.0, xs)[0]

    def unrolled(w):
        return sum((jnp.full((1, 1), 0.25) @ w).sum() for _ in range(300))

    one = jnp.ones((1, 1))
    assert jax.grad(jaxmp.autocast(scanned))(one) == 1250
    assert jax.grad(jaxmp.autocast(unrolled))(one) == 75


def test_draws_are_bit_identical():
    def fn(w, x):
        h = x @ w
        keep = jax.random.bernoulli(jax.random.key(3), 0.5, h.shape)
        return keep, jax.random.normal(jax.random.key(4), (5,)), jnp.where(keep, h, 0)

    actual, expected = jaxmp.autocast(fn)(W, X), fn(W, X)
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])


def test_the_residual_stream_is_half_and_the_norms_float32():
    def fn(w, x):
        x = x @ w
        for _ in range(2):
            h = jax.nn.standardize(x) * w[:1] + w[1:2]
            x = x + jax.nn.gelu(h @ w) @ w
        return x @ w

    rows = jaxmp.explain(fn)(W, X).rows
    sums = [r.after for r in rows if r.operation == "add" and "low" in r.reason]
    assert sums.count("bf16 bf16 -> bf16") == 2
    norms = {r.after for r in rows if "standardize" in r.operation}
    assert norms == {"f32 -> f32"}
