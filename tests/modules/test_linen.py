"""`apply_policy` on linen modules: every way of calling them."""

import copy
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp import PolicyRule, apply_policy, default_rules
from jaxmp.testing import matmuls

from .linen_models import BF16, F16, F32, HALF, KEY, Compact, Model, X, dtypes, same


@pytest.mark.parametrize("module", [Model(), Compact()], ids=["setup", "compact"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bf16-true"])
def test_init_gives_the_same_values_stored_in_the_parameter_dtype(module, policy):
    plain = jax.jit(module.init)(KEY, X)
    policy = jaxmp.get_policy(policy)
    variables = jax.jit(apply_policy(module, policy).init)(KEY, X)
    assert jax.tree.structure(plain) == jax.tree.structure(variables)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(plain),
        jax.tree.leaves(variables),
        strict=True,
    ):
        is_norm = "norm" in jax.tree_util.keystr(path)
        assert y.dtype == (F32 if is_norm else policy.param_dtype), path
        np.testing.assert_array_equal(x.astype(y.dtype), y)


def test_apply_leaves_the_variables_and_the_original_as_they_were():
    model = Model()
    variables = model.init(KEY, X)
    before, fields = jax.tree.map(jnp.copy, variables), repr(model)
    expected = model.apply(variables, X)
    apply_policy(model, "bf16-true").apply(variables, X)
    assert same(before, variables)
    assert repr(model) == fields
    assert same(model.apply(variables, X), expected)
    assert dtypes(model.apply(variables, X)) == (F32, F32)


def test_mutable_collections_and_intermediates():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(8)(x))
            self.sow("metrics", "mean", x.mean(0))
            counter = self.variable("counter", "calls", lambda: jnp.int32(0))
            counter.value += 1
            return x

    model = apply_policy(Net(), "bf16-true")
    variables = model.init(KEY, X)
    variables.pop("metrics")
    output, state = model.apply(
        variables,
        X,
        mutable=["batch_stats", "metrics", "counter", "intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
    )
    assert output.dtype == BF16
    assert dtypes(state["batch_stats"]["norm"]) == {"mean": F32, "var": F32}
    assert state["counter"]["calls"] == 2
    # The code around sees the results of a layer as it would without a policy.
    assert dtypes(state["metrics"]) == {"mean": (F32,)}
    assert dtypes(state["intermediates"]) == {"Dense_0": {"__call__": (F32,)}}


def test_batch_statistics_equal_those_of_float32():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    big = 100 * X  # representable in bfloat16 or not, the inputs are the same
    big = big.astype(BF16).astype(F32)
    variables = Net().init(KEY, big)
    _, plain = Net().apply(variables, big, mutable=["batch_stats"])
    model = apply_policy(Net(), "mixed_bfloat16")
    _, state = model.apply(variables, big, mutable=["batch_stats"])
    assert same(plain, state)


def test_dropout_draws_what_it_draws_in_float32():
    model, rngs = nn.Dropout(0.5, deterministic=False), {"dropout": KEY}
    plain = model.apply({}, X, rngs=rngs)
    half = apply_policy(model, HALF).apply({}, X, rngs=rngs)
    assert half.dtype == BF16
    np.testing.assert_array_equal(plain == 0, half == 0)
    assert 0 < jnp.mean(plain == 0) < 1


@pytest.mark.parametrize(
    "method",
    [
        "encode",
        Model.encode,
        lambda model, x: model.encode(x),
        lambda model, x: model.encoder(x),
    ],
    ids=["name", "function", "lambda", "lambda-of-layer"],
)
def test_method(method):
    model = apply_policy(Model(), HALF)
    variables = model.init(KEY, X)
    assert model.apply(variables, X, method=method).dtype == BF16
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, X, method=method))(variables)
    assert {m.output for m in matmuls(jaxpr)} == {BF16}
    assert Model().apply(variables, X, method=method).dtype == F32


def test_functional_forms_of_flax():
    model = apply_policy(Model(), HALF)
    variables = nn.init(lambda m, x: m(x), model)(KEY, X)
    assert nn.apply(lambda m, x: m.encode(x), model)(variables, X).dtype == BF16


def test_integers_keys_and_flags_pass_untouched():
    seen = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens, mask, key, x, scale, train):
            seen.append((tokens.dtype, mask.dtype, key.dtype, x.dtype, scale, train))
            return nn.Embed(10, 4)(tokens), tokens, mask

    tokens, mask = jnp.arange(4), jnp.ones(4, bool)
    model = apply_policy(Net(), HALF)
    args = (tokens, mask, KEY, np.ones(4, np.float32), 0.5, True)
    rows, same_tokens, same_mask = model.init_with_output(KEY, *args)[0]
    assert seen[-1] == (tokens.dtype, mask.dtype, KEY.dtype, F32, 0.5, True)
    assert rows.dtype == BF16
    assert same(same_tokens, tokens)
    assert same(same_mask, mask)


def layers_of(bound):
    return {
        "encoder": bound.encoder,
        "encoder/dense": bound.encoder.dense,
        "blocks_1": bound.blocks[1],
        "heads_b": bound.heads["b"],
    }


@pytest.mark.parametrize("path", layers_of(Model().bind({})))
def test_layers_of_a_bound_module_keep_their_policy(path):
    plain = Model()
    model = apply_policy(plain, HALF)
    variables = plain.init(KEY, X)
    layer = layers_of(model.bind(variables))[path]
    assert layer(X).dtype == BF16
    unbound, of_layer = layer.unbind()
    assert unbound.apply(of_layer, X).dtype == BF16
    assert unbound.bind(of_layer)(X).dtype == BF16
    assert layers_of(plain.bind(variables))[path](X).dtype == F32


def test_layers_of_a_bound_module_inherit_from_rules_on_what_is_around_them():
    rules = (PolicyRule(path="encoder", compute="float32"), *default_rules)
    model = apply_policy(Model(), HALF, rules=rules)
    bound = model.bind(model.init(KEY, X))
    assert bound.encoder.dense(X).dtype == F32
    assert bound.encoder(X).dtype == BF16
    assert bound.blocks[0](X).dtype == BF16
    dense, variables = bound.encoder.dense.unbind()
    assert dense.apply(variables, X).dtype == F32


def test_a_bound_module_can_be_given_a_policy():
    variables = Model().init(KEY, X)
    bound = apply_policy(Model().bind(variables), HALF)
    assert dtypes(bound(X)) == (BF16, BF16)
    assert bound.encoder(X).dtype == BF16


def test_an_error_inside_leaves_nothing_behind():
    model = apply_policy(Model(), HALF)
    bound = model.bind(model.init(KEY, X))
    block = bound.blocks[0]
    with pytest.raises(Exception, match="shape"):
        block(X[:, :3])
    assert "param" not in vars(block)
    assert block.dtype is None
    assert Model().apply(model.init(KEY, X), X)[0].dtype == F32


def test_tabulate_shows_the_dtypes():
    table = apply_policy(Model(), "bf16-true").tabulate(KEY, X)
    assert "bfloat16" in table
    assert "bfloat16" not in Model().tabulate(KEY, X)
    assert "blocks_1" in table


def test_the_class_looks_like_the_original():
    model = apply_policy(Model(activation="tanh"), HALF)
    assert isinstance(model, Model)
    assert type(model).__name__ == "Model"
    assert type(model).__qualname__ == Model.__qualname__
    assert type(model).__doc__ == Model.__doc__
    assert repr(model) == repr(Model(activation="tanh"))
    assert model.activation == "tanh"


def test_equality_and_hash():
    def make(policy=HALF, rules=default_rules, activation="relu"):
        return apply_policy(Model(activation), policy, rules=rules)

    assert make() == make()
    assert hash(make()) == hash(make())
    others = [
        make("mixed_float16"),
        make(rules=()),
        make(activation="tanh"),
        Model(),
    ]
    assert all(make() != other for other in others)


def test_equal_modules_share_a_compilation():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(model, variables):
        traces.append(model)
        return model.apply(variables, X)

    variables = Model().init(KEY, X)
    found = [
        dtypes(apply(model, variables))[0]
        for model in (
            apply_policy(Model(), HALF),
            apply_policy(Model(), HALF),
            Model(),
            apply_policy(Model(), "p=f32,c=f16,o=f16"),
        )
    ]
    assert found == [BF16, BF16, F32, F16]
    assert len(traces) == 3


@pytest.mark.parametrize(
    "duplicate",
    [
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.copy,
        copy.deepcopy,
        lambda m: m.clone(),
        lambda m: m.copy(),
    ],
    ids=["pickle", "copy", "deepcopy", "clone", "flax-copy"],
)
def test_copies_keep_the_policy(duplicate):
    model = apply_policy(Model("tanh"), HALF)
    again = duplicate(model)
    assert again == model
    assert dtypes(again.apply(model.init(KEY, X), X)) == (BF16, BF16)


def test_policies_applied_twice_the_outer_one_holds():
    model = apply_policy(apply_policy(Model(), "bf16-true"), "mixed_float16")
    variables = model.init(KEY, X)
    assert set(jax.tree.leaves(dtypes(variables))) == {F32}
    assert dtypes(model.apply(variables, X)) == (F32, F32)
    assert model == apply_policy(Model(), "mixed_float16")
