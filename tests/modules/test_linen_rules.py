"""Rules of `apply_policy` on linen modules, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxmp import PolicyRule, apply_policy, default_rules, describe
from jaxmp.errors import InvalidRule, NotAModule, PolicyError, UnusedRule
from jaxmp.policy import head_in_float32, matmuls_in_half
from jaxmp.testing import equations, matmuls

from .linen_models import BF16, F16, F32, HALF, KEY, Encoder, Model, X, dtypes


def outputs(model, *args, rules=default_rules, policy=HALF):
    """What every layer returns, by path, where nothing is planned."""
    model = apply_policy(model, policy, rules=rules, own_code="half")

    def run():
        variables = model.init(KEY, *args)
        return model.apply(variables, *args, capture_intermediates=True, mutable=True)

    layers = jax.eval_shape(run)[1]["intermediates"]
    return {
        "/".join(key.key for key in path[:-1] if hasattr(key, "key"))
        .removesuffix("__call__")
        .removesuffix("/"): x.dtype
        for path, x in jax.tree_util.tree_leaves_with_path(layers)
    }


RULES = {
    "nothing": ((), BF16, BF16, BF16),
    "path": ((PolicyRule(path="blocks_0", output="float32"),), F32, BF16, BF16),
    "regex": ((PolicyRule(path=r"blocks_\d", output="float32"),), F32, F32, BF16),
    "class": ((PolicyRule(module_type=nn.Dense, output="float32"),), F32, F32, BF16),
    "name": ((PolicyRule(module_type="Dense", output="float32"),), F32, F32, BF16),
    "kind": ((PolicyRule(kind="dense", output="float32"),), F32, F32, BF16),
    "where": (
        (PolicyRule(where=lambda path, m: path.endswith("1"), output="float32"),),
        *(BF16, F32, BF16),
    ),
    "first wins": (
        (
            PolicyRule(path="blocks_0", output="float16"),
            PolicyRule(kind="dense", output="float32"),
        ),
        *(F16, F32, BF16),
    ),
    "both": (
        (PolicyRule(kind="dense", path=".*1", output="float32"),),
        *(BF16, F32, BF16),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    rules, first, second, encoder = RULES[name]
    found = outputs(Model(), X, rules=(*rules, *default_rules))
    assert (found["blocks_0"], found["blocks_1"]) == (first, second)
    assert found["encoder"] == encoder
    assert found["encoder/norm"] == BF16


def test_what_a_rule_leaves_out_is_inherited():
    rules = (PolicyRule(path="encoder", params="bfloat16", compute="float32"),)
    model = apply_policy(Model(), HALF, rules=rules)
    variables = model.init(KEY, X)["params"]
    assert set(jax.tree.leaves(dtypes(variables["encoder"]["dense"]))) == {BF16}
    assert set(jax.tree.leaves(dtypes(variables["encoder"]["norm"]))) == {F32}
    assert set(jax.tree.leaves(dtypes(variables["blocks_0"]))) == {F32}
    found = outputs(Model(), X, rules=rules)
    assert found["encoder/dense"] == F32
    assert found["encoder"] == BF16


def test_head_in_float32():
    found = outputs(
        Model(), X, rules=(*head_in_float32("heads_a"), *default_rules), policy=HALF
    )
    assert (found["heads_a"], found["heads_b"]) == (F32, BF16)
    model = apply_policy(
        Model(), "bf16-true", rules=(*head_in_float32("heads_a"), *default_rules)
    )
    jaxpr = jax.make_jaxpr(model.init_with_output)(KEY, X)
    assert [m.output for m in matmuls(jaxpr)].count(F32) == 1
    variables = model.init(KEY, X)["params"]
    assert variables["heads_a"]["kernel"].dtype == F32
    assert variables["heads_b"]["kernel"].dtype == BF16


def test_matmuls_in_half_keeps_everything_else_in_float32():
    model = apply_policy(Model(), "float32", rules=matmuls_in_half("bfloat16"))
    variables = model.init(KEY, X)
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, X))(variables)
    assert {m.output for m in matmuls(jaxpr)} == {BF16}
    found = outputs(Model(), X, rules=matmuls_in_half("bfloat16"), policy="float32")
    assert set(found.values()) == {F32}


def test_everything_in_half_spares_no_norm():
    model = apply_policy(Encoder(), "bf16-true", rules=())
    variables = model.init(KEY, X)
    assert set(jax.tree.leaves(dtypes(variables))) == {BF16}
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, X))(variables)
    roots = [e for _, e in equations(jaxpr) if e.primitive.name == "rsqrt"]
    assert {e.outvars[0].aval.dtype for e in roots} == {BF16}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (default_rules, {"dense": F16, "norm": F16}),
        ((PolicyRule(kind="dense", compute="bfloat16"),), {"dense": BF16, "norm": F16}),
        (
            (PolicyRule(kind="norm", compute="float32", output="bfloat16"),),
            {"dense": F16, "norm": BF16},
        ),
    ],
    ids=["default", "dense", "norm"],
)
def test_an_authors_dtype_yields_to_a_users_rule_only(rules, expected):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, dtype=F16, name="dense")(x)
            return nn.LayerNorm(dtype=F16, name="norm")(x)

    found = outputs(Net(), X, rules=rules)
    assert {name: found[name] for name in expected} == expected
    assert found[""] == BF16


def test_an_authors_param_dtype_is_kept():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, param_dtype=F16)(x)

    output, variables = apply_policy(Net(), "mixed_bfloat16").init_with_output(KEY, X)
    assert set(jax.tree.leaves(dtypes(variables))) == {F16}
    assert output.dtype == F32


def test_a_rule_that_matches_nothing():
    rules = (PolicyRule(path="block_0", compute="float32"), *default_rules)
    model = apply_policy(Model(), HALF, rules=rules)
    variables = Model().init(KEY, X)
    calls = {
        "init": lambda: model.init(KEY, X),
        "apply": lambda: model.apply(variables, X),
        "jit": lambda: jax.jit(model.apply)(variables, X),
        "tabulate": lambda: model.tabulate(KEY, X),
        "bound": lambda: model.bind(variables)(X),
    }
    for call in calls.values():
        with pytest.raises(UnusedRule, match="Nearest paths: blocks_") as e:
            call()
        assert "path='block_0'" in str(e.value)
        assert "allow_unused=True" in str(e.value)
    # A method sees only some of the layers.
    assert model.apply(variables, X, method="encode").dtype == BF16
    assert model.bind(variables).encoder(X).dtype == BF16
    encoder, of_encoder = model.bind(variables).encoder.unbind()
    assert encoder.apply(of_encoder, X).dtype == BF16


def test_a_rule_may_be_allowed_to_match_nothing():
    rules = (PolicyRule(path="nothing", compute="float32", allow_unused=True),)
    assert apply_policy(Model(), HALF, rules=rules).init(KEY, X)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Model, "Model is a class, and apply_policy"),
        (nn.Dense, r"apply_policy\(Dense\(...\), policy\)"),
        ({"params": {}}, "looks like variables"),
        (jnp.tanh, "autocast"),
        (3, "this is a int"),
        (None, "NoneType"),
    ],
    ids=["class", "flax-class", "variables", "function", "number", "none"],
)
def test_what_is_no_module(module, words):
    with pytest.raises(NotAModule, match=words):
        apply_policy(module, HALF)


def test_bad_policies_and_rules():
    with pytest.raises(PolicyError, match="mixed_bfloat17"):
        apply_policy(Model(), "mixed_bfloat17")
    with pytest.raises(InvalidRule, match="takes a sequence of PolicyRule"):
        apply_policy(Model(), HALF, rules=["norm"])
    with pytest.raises(InvalidRule, match="not a regular expression"):
        PolicyRule(path="blocks_(", compute="float32")
    with pytest.raises(InvalidRule, match="Unknown kind"):
        PolicyRule(kind="dens", compute="float32")
    one = PolicyRule(path="blocks_0", compute="float32")
    assert apply_policy(Model(), HALF, rules=one).init(KEY, X)


def test_rules_of_the_user_come_before_the_default_ones():
    rule = PolicyRule(path="dense", compute="float32")
    for rules, norm in (
        ((rule,), "float32"),
        (rule, "float32"),
        ((rule, *default_rules), "float32"),
        ((rule, PolicyRule(kind="norm", compute="bfloat16")), "bfloat16"),
        ((), "bfloat16"),
    ):
        rows = describe(Encoder(), HALF, X, rules=rules).rows
        computes = {row.path: row.computes for row in rows}
        assert computes["norm"] == norm
        assert computes["dense"] == ("float32" if rules else "bfloat16")


def test_a_model_that_wraps_a_module_is_told_apart():
    class FlaxModel:
        module = Model()

    with pytest.raises(NotAModule, match=r"FlaxModel is not a module.*model\.module"):
        apply_policy(FlaxModel(), "mixed_bfloat16")


class ConvBatchNorm(nn.Module):
    """Called a norm for the norm in it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), name="conv")(x)
        w = self.param("w", nn.initializers.ones, (4, 4))
        x = nn.LayerNorm(name="norm")(x @ w)
        return Scale(name="scale")(x)


class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(x)


def test_layers_in_what_is_called_a_norm_are_not_kept_in_float32():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(ConvBatchNorm(name="block")(x))

    rows = {row.path: row.computes for row in describe(Net(), HALF, X).rows}
    assert rows["block"] == rows["block/norm"] == "float32"
    inside = ("block/conv", "block/scale", "block/scale/dense")
    assert {rows[path] for path in inside} == {"bfloat16"}
    model = apply_policy(Net(), HALF)
    jaxpr = jax.make_jaxpr(model.apply)(Net().init(KEY, X), X)
    assert [m.output for m in matmuls(jaxpr)] == [BF16, F32, BF16, BF16]
