"""`compare`: its figures against NumPy, its loss scales against what they promise."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxmp
from jaxmp.errors import HalfReferenceWarning, NumericsError, PolicyError
from jaxmp.numerics import compare
from jaxmp.numerics.compare._distance import Distance
from jaxmp.testing import zoo

rng = np.random.default_rng(0)
W = rng.normal(size=(16, 8)).astype(np.float32)
X = rng.normal(size=(32, 16)).astype(np.float32)


def row_of(rows, **wanted):
    found = [
        row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())
    ]
    assert len(found) == 1, found
    return found[0]


def rounded(x, dtype):
    return np.asarray(x).astype(dtype).astype(np.float64)


# Figures


def test_figures_are_those_of_numpy():
    wanted = rng.normal(size=100).astype(np.float32)
    given = wanted + rng.normal(size=100).astype(np.float32) * 0.1
    distance = Distance()
    distance.add(wanted[:30], given[:30])
    distance.add(wanted[30:], 4 * given[30:], scale=4.0)
    exact, other = wanted.astype(np.float64), given.astype(np.float64)
    error = np.linalg.norm(other - exact) / np.linalg.norm(exact)
    cosine = other @ exact / np.linalg.norm(other) / np.linalg.norm(exact)
    np.testing.assert_allclose(distance.relative_error, error, rtol=1e-12)
    np.testing.assert_allclose(distance.cosine, cosine, rtol=1e-12)
    np.testing.assert_allclose(distance.snr, -20 * np.log10(error), rtol=1e-12)
    assert (distance.size, distance.nonfinite) == (100, 0)


def test_what_is_not_finite_and_what_is_zero():
    biggest = float(np.finfo(np.float32).max)
    wanted = np.array([1.0, 2.0, np.inf, np.nan, -biggest, 0.0, 4.0], np.float32)
    given = np.array([1.0, np.inf, np.inf, 0.0, -np.inf, 0.0, 0.0], np.float32)
    distance = Distance()
    distance.add(wanted, given)
    assert (distance.size, distance.nonfinite, distance.zeroed) == (4, 1, 1)
    assert distance.underflow == 1 / 3
    assert distance.relative_error == np.inf
    assert distance.snr == -np.inf
    equal = Distance()
    equal.add(wanted, wanted)
    assert (equal.relative_error, equal.snr) == (0.0, np.inf)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_operands_and_results_are_rounded_to_the_format(dtype):
    def fn(w, x):
        return jax.nn.relu(x @ w) @ w.T

    name = jnp.dtype(dtype).name
    compared = compare(fn, name, W, X)
    row = row_of(compared.activations, operation="max")
    w = rounded(W, dtype)
    product = rounded((rounded(X, dtype) @ w).astype(np.float32), dtype)
    exact = X.astype(np.float64) @ W.astype(np.float64)
    wanted = np.maximum(exact, 0)
    error = np.linalg.norm(np.maximum(product, 0) - wanted) / np.linalg.norm(wanted)
    np.testing.assert_allclose(row.relative_error, error, rtol=0.01)
    assert row.dtype == name


def test_bare_float8_is_refused():
    with pytest.raises(PolicyError, match="mixed_fp8"):
        compare(lambda w: w @ w.T, "float8_e5m2", W)


def test_float64_reference():
    def fn(w, x):
        return x @ w

    with pytest.raises(NumericsError, match="jax_enable_x64"):
        compare(fn, "float32", W, X, reference="float64")
    with jax.enable_x64(True):
        compared = compare(fn, "float32", W, X, reference="float64")
        same = compare(fn, "float32", W, X)
    (row,) = compared.activations
    assert 1e-9 < row.relative_error < 1e-6
    assert same.activations[0].relative_error == 0


# Layers


def overflowing(w, x):
    with jax.named_scope("first"):
        h = jax.nn.relu(x @ w)
    with jax.named_scope("second"):
        h = (h * 1e4) * 1e4
        h = h * 1e-8
    with jax.named_scope("third"):
        return jnp.mean((h @ w.T) ** 2)


def test_trouble_comes_first_at_its_line_and_path():
    compared = compare(overflowing, ["bfloat16", "float16"], W, X)
    worst = compared.activations[0]
    assert (worst.policy, worst.path) == ("float16", "second")
    assert worst.operation == "mul"
    assert worst.line == overflowing.__code__.co_firstlineno + 4
    assert worst.nonfinite > 0
    assert compared.kinds >= {"nonfinite", "fine"}
    errors = [row.relative_error for row in compared.activations]
    assert errors == sorted(errors, reverse=True)
    fine = [row for row in compared.activations if row.policy == "bfloat16"]
    assert all(row.relative_error < 0.02 for row in fine)


def test_a_layer_is_its_last_operation():
    compared = compare(overflowing, "bfloat16", W, X)
    found = {row.path: row for row in compared.layers}
    assert set(found) == {"first", "second", "third"}
    assert found["first"].operation == "max"
    assert found["second"].operation == "mul"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="up")(x))
        return nn.Dense(4, name="down")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 16, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_linen_modules_are_layers():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    compared = compare(
        lambda v: jnp.mean(model.apply(v, X) ** 2), "mixed_bfloat16", variables
    )
    assert {row.path for row in compared.layers} >= {"Net/up", "Net/down"}
    assert len(compared.gradients) == 4
    assert all(row.cosine > 0.999 for row in compared.gradients)


def test_nnx_modules_are_layers_and_their_parameters_have_names():
    model = NnxNet(nnx.Rngs(0))
    compared = compare(lambda m, x: jnp.mean(m(x) ** 2), "mixed_bfloat16", model, X)
    assert {row.path for row in compared.layers} >= {"NnxNet/up", "NnxNet/down"}
    names = {row.parameter for row in compared.gradients}
    assert names == {f"m.{a}.{b}" for a in ("up", "down") for b in ("kernel", "bias")}


def test_loops_branches_and_checkpoints_are_looked_into():
    def fn(w, x):
        def body(h, scale):
            h = lax.cond(scale > 1, jnp.sin, jnp.cos, h @ w)
            return jax.checkpoint(lambda h: h * scale)(h), None

        h, _ = lax.scan(body, x, jnp.array([0.5, 2.0, 3.0]))
        return h

    w = W[:8]
    compared = compare(fn, "bfloat16", w, X[:, :8])
    sizes = {row.operation: row.size for row in compared.activations}
    assert sizes == {"dot_general": 768, "cos": 256, "sin": 512, "mul": 768}
    assert all(0 < row.relative_error < 0.1 for row in compared.activations)


@pytest.mark.parametrize(
    "name",
    [
        "mlp-linen",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("lstm-nnx", "decoder-nnx")),
    ],
)
def test_operations_of_real_networks_are_found_again(name):
    model = next(model for model in zoo() if str(model) == name)
    apply, params, state = model.functional(model.make())

    def fn(params, *inputs):
        output, _ = apply(params, state, *inputs)
        return output, model.loss(output, model.target)

    half, same = (
        compare(fn, policy, params, *model.inputs) for policy in ("bfloat16", "float32")
    )
    assert len(half.activations) >= 0.8 * len(same.activations)
    assert all(row.relative_error == 0 for row in same.activations)
    assert all(row.relative_error < 0.1 for row in half.activations)


def one_line(p, x, mean):
    h = x @ p["w"]
    m, v = h.mean(0), h.var(0)
    # fmt: off
    y, m = (h - m) * (lax.rsqrt(v + 1e-5) * p["s"]) + p["b"], 0.9 * mean + p["s"] * m
    # fmt: on
    return jnp.mean(y**2 * p["s"]), m


class Normed(nn.Module):
    """Running statistics are computed between the steps of the norm itself."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return jnp.mean(x**2 * jnp.arange(8.0))


def normed(variables, x):
    return Normed().apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("kind", ["one line", "lines of a library"])
def test_operations_that_change_places_are_compared_with_their_own(kind):
    rows = np.linspace(-1, 2, 8, dtype=np.float32)
    fn, args = one_line, ({"w": W, "s": rows, "b": rows}, X, 5 + rows)
    with jax.numpy_rank_promotion("allow"):
        if kind == "lines of a library":
            fn, args = normed, (Normed().init(jax.random.key(0), X), X)
        found = compare(fn, "bfloat16", *args).activations
    assert sum(row.operation == "mul" for row in found) >= 4
    assert all(row.relative_error < 0.03 for row in found)


# Gradients and loss scales


def small(w, x):
    return jnp.mean(jax.nn.relu(x @ w) @ w.T) * 3e-7


def test_gradients_that_become_zero():
    compared = compare(small, ["bfloat16", "float16"], W, X)
    row = row_of(compared.gradients, policy="float16")
    assert row.parameter == "w"
    assert row.zeroed_unscaled > 0.5
    assert row.zeroed == 0
    assert row.relative_error < 1e-3
    assert row.kind == "underflow"
    assert compared.policy("float16").lost_unscaled > 0.2
    assert row_of(compared.gradients, policy="bfloat16").zeroed_unscaled == 0


def test_loss_scales_keep_their_promise():
    dtype = "float16"

    def at(scale):
        compared = compare(small, dtype, W, X, loss_scale=scale)
        assert compared.policy(dtype).loss_scale == scale
        return compared.gradients[0]

    found = compare(small, dtype, W, X).policy(dtype)
    assert found.smallest_scale > 1
    assert at(found.largest_scale).nonfinite == 0
    assert at(2 * found.largest_scale).nonfinite > 0
    assert found.loss_scale == found.smallest_scale <= found.largest_scale
    assert found.lost_at_largest == 0
    # Powers of two change no digit where nothing is subnormal.
    errors = [at(found.smallest_scale * x).relative_error for x in (1, 8)]
    np.testing.assert_allclose(*errors, rtol=1e-3)


def test_scales_are_exact_at_the_borders():
    def loss(w):
        # The cotangents of the product are 2^-30 and 2^-20.
        return jnp.sum((w @ jnp.eye(2)) * jnp.array([[2.0**-30], [2.0**-20]]))

    found = compare(loss, "float16", jnp.ones((2, 2))).policy("float16")
    # 2^-14 is normal, 2^-15 is not; 2^15 is finite, 2^16 is not; 2^-25 becomes zero.
    assert found.smallest_scale == 2.0**16
    assert found.largest_scale == 2.0**35
    assert found.lost_unscaled == 0.5


def test_a_gradient_that_is_zero_but_for_rounding_is_no_alarm():
    def loss(params, x):
        y = x @ params["w"] + params["bias"]
        return jnp.mean((y - y.mean(0, keepdims=True)) ** 2)

    compared = compare(loss, "bfloat16", {"w": W, "bias": W[:1]}, X)
    bias = row_of(compared.gradients, parameter="params['bias']")
    assert bias.size == 8
    assert compared.policies[0].gradient_error < 0.1


def test_a_function_without_a_loss_has_no_gradients():
    compared = compare(lambda x: jnp.sin(x @ x.T), ["float16"], X)
    assert compared.gradients == ()
    row = compared.policy("float16")
    assert (row.gradient_error, row.loss_scale, row.largest_scale) == (None,) * 3
    assert 0 < row.output_error < 1e-2


# Forms


@pytest.fixture(scope="module")
def compared():
    return compare(overflowing, ["mixed_bfloat16", "mixed_float16"], W, X)


def test_rows_are_flat_and_complete(compared):
    rows = compared.to_rows()
    tables = {row["table"] for row in rows}
    assert tables == {"policy", "activation", "gradient"}
    assert all(
        isinstance(value, (str, int, float, bool, type(None)))
        for row in rows
        for value in row.values()
    )


def test_json_has_no_infinities(compared):
    told = json.loads(compared.to_json(), parse_constant=pytest.fail)
    assert len(told["rows"]) == len(compared.to_rows())


def test_text_and_page(compared, tmp_path):
    text = str(compared)
    for title in ("Policies", "Gradients", "What layers return", "Operations"):
        assert f"\n{title}" in f"\n{text}"
    assert "test_compare.py:" in text
    compared.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert 'data-kind="nonfinite"' in page


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compare(small, [], W, X), ("policies=[]", "policies=['bfloat16'")),
        (
            lambda: compare(small, "float16", W, X, reference="bfloat16"),
            ("reference='bfloat16'", "'float32'", "'float64'"),
        ),
        (
            lambda: compare(small, "float32", W, X).policy("float16"),
            ("'float16'", "There are: 'float32'"),
        ),
    ],
)
def test_mistakes_are_explained(call, words):
    with pytest.raises(NumericsError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


def narrow_matmul(w, x):
    return jnp.mean((x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)) ** 2)


class Twice(nn.Module):
    """A matmul of a layer, and one of its own, in one dtype."""

    dtype: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dtype=self.dtype)(x)
        return jnp.mean(x @ jnp.ones((16, 4), self.dtype))


def in_half(kind):
    """A function that multiplies in half, and in how many of its matmuls."""
    if kind == "by hand":
        return narrow_matmul, (W, X), "1 of 1 matmuls"
    if kind == "nnx":
        model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
        policied = jaxmp.apply_policy(model, "mixed_bfloat16")
        return lambda m, x: jnp.mean(m(x)), (policied, X), "1 of 1 matmuls"
    model = Twice(jnp.bfloat16 if kind == "dtype of a layer" else None)
    params = model.init(jax.random.key(0), X)
    if kind == "apply_policy":
        model = jaxmp.apply_policy(model, "mixed_bfloat16")
    return model.apply, (params, X), "2 of 2 matmuls"


@pytest.mark.parametrize("kind", ["by hand", "nnx", "dtype of a layer", "apply_policy"])
def test_a_reference_in_half_warns(kind):
    fn, args, count = in_half(kind)
    with pytest.warns(HalfReferenceWarning, match=count) as found:
        compare(fn, "bfloat16", *args)
    (warning,) = found
    assert "bfloat16, the first at " in str(warning.message)
    assert warning.filename == __file__


def test_a_loop_in_half_warns_once_for_its_matmul():
    def loop(w, x):
        def step(x, _):
            return jnp.tanh(x.astype(jnp.float16) @ w.astype(jnp.float16)), None

        return jnp.mean(lax.scan(step, x.astype(jnp.float16), length=3)[0])

    with pytest.warns(HalfReferenceWarning, match="1 of 1 matmuls .* float16"):
        compare(loop, "float16", np.eye(16, dtype=np.float32), X)
