"""What the user's own layers compute under a policy: planned as `autocast` plans it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import jaxmp
from jaxmp import PolicyRule, apply_policy
from jaxmp.testing import matmuls
from tests.support.thinning import every_second

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (16, 8))
POLICIES = ("mixed_bfloat16", "mixed_float16")
policies = pytest.mark.parametrize("policy", POLICIES)

# What a layer computes of `h`, the result of a Dense layer, and of its own weight `w`.
ONES = jnp.ones(3000)


def as_ones(h):
    return ONES * (1 + 0 * h[0, 0])


def segment_sum(h, w):
    return jax.ops.segment_sum(as_ones(h), jnp.zeros(3000, jnp.int32), 2)[0]


def scatter_add(h, w):
    return jnp.zeros(2).at[jnp.zeros(3000, jnp.int32)].add(as_ones(h))[0]


def scanned_sum(h, w):
    return jax.lax.scan(lambda c, x: (c + x, None), 0.0, as_ones(h))[0]


def looped_sum(h, w):
    ones = as_ones(h)
    return jax.lax.fori_loop(0, 3000, lambda i, c: c + ones[i], 0.0)


def running_sum(h, w):
    return jnp.cumsum(as_ones(h))[-1]


def log_of_a_clipped_probability(h, w):
    p = nn.sigmoid(40 * h)
    return -jnp.log1p(-jnp.clip(p, 1e-6, 1 - 1e-6)).mean()


def normalised_weight(h, w):
    v = 240 * w
    return (h @ (v / jnp.sqrt(jnp.sum(v * v)))).mean()


def standardised_weight(h, w):
    small = 1e-5 * w
    std = jnp.sqrt(jnp.var(small, 0) + 1e-14)
    return (h @ ((small - small.mean(0)[None]) / std[None])).std()


def entropy(h, w):
    p = jax.nn.softmax(h @ w)
    return -(p * jnp.log(p + 1e-9)).sum(-1).mean()


def cross_entropy(h, w):
    logits = h @ w
    return -jax.nn.log_softmax(100 * logits)[:, 0].mean()


OWN_CODE = [
    segment_sum,
    scatter_add,
    scanned_sum,
    looped_sum,
    running_sum,
    log_of_a_clipped_probability,
    normalised_weight,
    standardised_weight,
    entropy,
    cross_entropy,
]


class LinenNet(nn.Module):
    own_code: object

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (8, 8))
        return self.own_code(nn.Dense(8)(x), w)


class NnxNet(nnx.Module):
    def __init__(self, own_code, rngs):
        self.own_code = own_code
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.w = nnx.Param(jax.random.normal(KEY, (8, 8)))

    def __call__(self, x):
        return self.own_code(self.dense(x), self.w[...])


def linen(own_code, policy=None):
    """The output as a function of parameters, and the parameters."""
    model = LinenNet(own_code)
    params = model.init(KEY, X)
    if policy is not None:
        model = apply_policy(model, policy)
    return lambda params: model.apply(params, X), params


def in_nnx(own_code, policy=None):
    model = NnxNet(own_code, nnx.Rngs(0))
    if policy is not None:
        model = apply_policy(model, policy)
    graph, params = nnx.split(model, nnx.Param)
    return lambda params: nnx.merge(graph, params)(X), params


@every_second(
    "own_code kind policy",
    OWN_CODE,
    [linen, in_nnx],
    POLICIES,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sums_probabilities_and_norms_are_those_of_float32(own_code, kind, policy):
    f, params = kind(own_code)
    wanted, wanted_grads = jax.value_and_grad(f)(params)
    f, _ = kind(own_code, policy)
    found, grads = jax.jit(jax.value_and_grad(f))(params)
    assert found.dtype == F32
    tolerance = 0.05 if policy == "mixed_bfloat16" else 0.01
    np.testing.assert_allclose(found, wanted, rtol=tolerance)
    for got, want in zip(
        jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True
    ):
        scale = float(jnp.abs(want).max()) or 1.0
        np.testing.assert_allclose(got, want, atol=5 * tolerance * scale)


@policies
@pytest.mark.parametrize("own_code", [segment_sum, log_of_a_clipped_probability])
def test_autocast_around_a_policy_changes_nothing(own_code, policy):
    f, params = linen(own_code, policy)
    assert jaxmp.autocast(f, policy)(params) == f(params)


@pytest.mark.parametrize(("own_code", "dtype"), [("half", BF16), ("autocast", F32)])
def test_own_code_sees_half_only_if_asked_to(own_code, dtype):
    seen = []

    def look(h, w):
        seen.append((h.dtype, w.dtype))
        return h @ w

    model = apply_policy(LinenNet(look), "mixed_bfloat16", own_code=own_code)
    model.apply(LinenNet(look).init(KEY, X), X)
    assert seen[-1] == (dtype, dtype)


def test_code_that_needs_values_is_told_what_runs_it():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x if x.sum() > 0 else -x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.dense(x * float(x.sum()))

    params = Net().init(KEY, X)
    model = apply_policy(Net(), "mixed_bfloat16")
    for run in (
        lambda: model.apply(params, X),
        lambda: model.bind(params)(X),
        lambda: apply_policy(Nnx(nnx.Rngs(0)), "mixed_bfloat16")(X),
    ):
        with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
            run()
        assert sum("own_code='half'" in note for note in caught.value.__notes__) == 1
    apply_policy(Net(), "mixed_bfloat16", own_code="half").apply(params, X)


def test_own_matmuls_are_in_half():
    f, params = linen(cross_entropy, "mixed_bfloat16")
    found = matmuls(jax.make_jaxpr(jax.grad(f))(params))
    assert {m.output for m in found} == {BF16}
    assert len(found) == 5


def test_a_gradient_of_rows_that_are_read_often_adds_up_in_float32():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(4)(x)
            return h[jnp.zeros(3000, jnp.int32)].sum() / 8

    params = Net().init(KEY, X)
    model = apply_policy(Net(), "mixed_bfloat16")
    bias = jax.grad(lambda p: model.apply(p, X))(params)["params"]["Dense_0"]["bias"]
    np.testing.assert_allclose(bias, 375, rtol=0.01)


def test_a_loss_made_inside_the_model_is_float32():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, labels=None):
            logits = nn.Dense(8)(x)
            if labels is None:
                return logits, None
            log_p = jax.nn.log_softmax(logits)
            return logits, -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

    labels = jnp.arange(16) % 8
    params = Net().init(KEY, X)
    wanted = Net().apply(params, X, labels)[1]
    for output in ("float32", "bfloat16"):
        model = apply_policy(Net(), f"p=f32,c=bf16,o={output}")
        logits, loss = model.apply(params, X, labels)
        assert (logits.dtype, loss.dtype) == (jnp.dtype(output), F32)
        np.testing.assert_allclose(loss, wanted, rtol=0.01)


def test_a_scan_finds_the_carry_that_it_started_with():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(8)
            dense(x)

            def body(dense, carry, x):
                return dense(carry + x), None

            carry = jnp.zeros((4, 8))
            scan = nn.scan(body, variable_broadcast="params", split_rngs={})
            return scan(dense, carry, X.reshape(4, 4, 8))[0]

    params = Net().init(KEY, X)
    model = apply_policy(Net(), "mixed_bfloat16")
    np.testing.assert_allclose(model.apply(params, X), Net().apply(params, X), atol=0.1)


def test_parameters_are_shown_as_they_were_written_and_stored_in_half():
    seen = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (8, 8))
            seen.append((w.dtype, x.dtype))
            return x @ w

    model = apply_policy(Net(), "bf16-true")
    params = model.init(KEY, X)
    assert params["params"]["w"].dtype == BF16
    assert model.apply(params, X).dtype == BF16
    assert set(seen) == {(F32, F32)}


def test_nnx_layers_in_linen():
    plain = bridge.ToLinen(nnx.Linear, args=(8, 3))
    params = plain.init(KEY, X)
    model = apply_policy(plain, "mixed_bfloat16")
    assert jax.tree.structure(model.init(KEY, X)) == jax.tree.structure(params)
    jaxpr = jax.make_jaxpr(model.apply)(params, X)
    assert {m.output for m in matmuls(jaxpr)} == {BF16}


def test_linen_layers_in_nnx():
    class Net(nnx.Module):
        def __init__(self):
            self.inner = bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)).lazy_init(X)

        def __call__(self, x):
            return self.inner(x)

    wanted, model = Net()(X), apply_policy(Net(), "mixed_bfloat16")
    assert {m.output for m in matmuls(jax.make_jaxpr(lambda m: m(X))(model))} == {BF16}
    np.testing.assert_allclose(model(X), wanted, atol=0.05)


def test_modules_that_answer_for_attributes():
    class Net(nn.Module):
        def setup(self):
            self.dense = nn.Dense(8)

        def __getattr__(self, name):
            if name.startswith("any_"):
                return 3.0
            raise AttributeError(name)

        def __call__(self, x):
            return self.dense(x) * self.any_thing

    params = Net().init(KEY, X)
    model = apply_policy(Net(), "mixed_bfloat16")
    np.testing.assert_allclose(model.apply(params, X), Net().apply(params, X), atol=0.1)
    assert model.any_thing == 3.0


def test_a_param_dtype_that_means_something_else():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.param_dtype = "the dtype of my parameters"
            self.dense = nnx.Linear(8, 8, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            return self.dense(x) * self.scale[...][None]

    model = apply_policy(Layer(nnx.Rngs(0)), "bf16-true")
    assert model.scale[...].dtype == BF16
    assert model(X).dtype == BF16


# Statics, state and what else a method takes and returns.


def test_what_is_no_array_passes():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, name, scale=2.0, flags=None):
            h = nn.Dense(8)(x) * scale
            assert isinstance(scale, float)
            return {"h": h, "name": name, "f": functools.partial(jnp.add, 1)}, flags

    model = apply_policy(Net(), "mixed_bfloat16")
    params = model.init(KEY, X, "a")
    found, flags = (
        jax.jit(lambda p: {"h": model.apply(p, X, "b", flags=(True, None))[0]["h"]})(
            params
        ),
        model.apply(params, X, "b", flags=(True, None))[1],
    )
    assert found["h"].dtype == F32
    assert flags == (True, None)
    assert model.apply(params, X, "b")[0]["f"](1) == 2


def test_an_nnx_method_that_returns_layers():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

        def layer(self, i):
            return self.layers[i]

        def __call__(self, x):
            for i in range(2):
                x = self.layer(i)(x)
            return x

    model = apply_policy(Net(nnx.Rngs(0)), "mixed_bfloat16")
    assert model.layer(1) is model.layers[1]
    assert {m.output for m in matmuls(jax.make_jaxpr(lambda m: m(X))(model))} == {BF16}


def test_what_an_nnx_method_writes_is_kept():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.calls = nnx.Variable(jnp.int32(0))
            self.mode = "new"

        def __call__(self, x):
            self.calls[...] += 1
            self.mode = "used"
            h = self.dropout(self.dense(x))
            self.last = nnx.Intermediate(h)
            return h

    model = apply_policy(Net(nnx.Rngs(0)), "mixed_bfloat16")
    first, second = model(X), model(X)
    assert int(model.calls[...]) == 2
    assert model.mode == "used"
    np.testing.assert_array_equal(model.last[...], second)
    assert not bool(jnp.all(first == second))


def test_a_module_from_outside_of_a_vmap_can_be_called_inside():
    model = apply_policy(NnxNet(entropy, nnx.Rngs(0)), "mixed_bfloat16")
    found = jax.vmap(lambda x: model(x[None]))(X)
    assert found.shape == (16,)
    grads = jax.grad(lambda x: model(x))(X)
    assert bool(jnp.isfinite(grads).all())


def test_a_rule_in_another_half_dtype():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LinenNet(cross_entropy, name="loss")(nn.Dense(8)(x))

    rules = (PolicyRule(path="loss", compute="float16"),)
    params = Net().init(KEY, X)
    for rule, inside in ((rules, F16), ((), BF16)):
        model = apply_policy(Net(), "mixed_bfloat16", rules=rule)
        jaxpr = jax.make_jaxpr(model.apply)(params, X)
        assert [m.output for m in matmuls(jaxpr)] == [BF16, inside, inside]


def test_a_rule_keeps_a_layer_of_the_users_in_float32():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(LinenNet(cross_entropy, name="head")(nn.Dense(8)(x)) * x)

    params = Net().init(KEY, X)
    rules = (PolicyRule(path="head", compute="float32"),)
    model = apply_policy(Net(), "mixed_bfloat16", rules=rules)
    jaxpr = jax.make_jaxpr(model.apply)(params, X)
    assert [m.output for m in matmuls(jaxpr)] == [BF16, F32, F32, BF16]
