"""`apply_policy` and nested linen modules, lifted and shared."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp import PolicyRule, apply_policy, default_rules
from jaxmp.testing import matmuls
from tests.support.thinning import every_second

from .linen_models import BF16, F16, F32, HALF, KEY, Compact, X, dtypes, same


class InField(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(x), nn.Dense(2, name="other")(x)


class InSetup(nn.Module):
    def setup(self):
        self.layer = apply_policy(Compact(), HALF)
        self.other = nn.Dense(2)

    def __call__(self, x):
        return self.layer(x), self.other(x)


class InCompact(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = apply_policy(Compact(name="layer"), HALF)
        return layer(x), nn.Dense(2, name="other")(x)


@pytest.mark.parametrize(
    "outer",
    [
        InField(apply_policy(Compact(), HALF)),
        InSetup(),
        InCompact(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_as_a_layer_of_a_module_without_policy(outer):
    variables = outer.init(KEY, X)
    inside, outside = outer.apply(variables, X)
    assert (inside.dtype, outside.dtype) == (BF16, F32)
    plain = InField(Compact()).init(KEY, X)
    assert jax.tree.structure(plain) == jax.tree.structure(variables)


def test_an_outer_policy_holds_for_a_layer_with_a_policy_of_its_own():
    outer = apply_policy(InSetup(), "p=f32,c=f16,o=f16")
    assert dtypes(outer.init_with_output(KEY, X)[0]) == (F16, F16)


def test_two_models_in_one_keep_their_policies():
    class Both(nn.Module):
        def setup(self):
            self.a = apply_policy(Compact(), HALF)
            self.b = apply_policy(Compact(), "p=f32,c=f16,o=f16")
            self.c = Compact()

        def __call__(self, x):
            return self.a(x), self.b(x), self.c(x)

    assert dtypes(Both().init_with_output(KEY, X)[0]) == (BF16, F16, F32)


def test_a_model_called_inside_is_left_alone():
    teacher = nn.Dense(8)
    frozen = teacher.init(KEY, X)
    seen = []

    class Student(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(teacher.apply(frozen, x.astype(F32)).dtype)
            return nn.Dense(2)(x)

    assert apply_policy(Student(), HALF).init_with_output(KEY, X)[0].dtype == BF16
    assert seen == [F32]


def test_an_interceptor_of_the_user_sees_the_policy():
    seen = []

    def interceptor(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            seen.append((context.module.name, output.dtype))
        return output

    model = apply_policy(Compact(), HALF, own_code="half")
    with nn.intercept_methods(interceptor):
        model.init_with_output(KEY, X)
    assert dict(seen)["layer"] == BF16


class Carry(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(8)(x), None


def scanned(module, x):
    del module
    layers = nn.scan(
        Carry, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    return layers(name="layer")(x, None)[0]


def scanned_and_rematerialised(module, x):
    del module
    layers = nn.scan(
        nn.remat(Carry),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )
    return layers(name="layer")(x, None)[0]


def scanned_function(module, x):
    del module
    scan = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_broadcast="params",
        split_rngs={"params": False},
        length=3,
    )
    return scan(nn.Dense(8, name="layer"), x, None)[0]


def while_loop(module, x):
    layer = nn.Dense(8, name="layer")
    if module.is_initializing():
        return layer(x)
    return nn.while_loop(
        lambda _, carry: carry[0] < 3,
        lambda layer, carry: (carry[0] + 1, layer(carry[1])),
        layer,
        (0, x),
    )[1]


def cond(module, x):
    layer = nn.Dense(8, name="layer")
    if module.is_initializing():
        return layer(x)
    return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: m(x) * 2, layer, x)


def switch(module, x):
    layer = nn.Dense(8, name="layer")
    if module.is_initializing():
        return layer(x)
    return nn.switch(1, [lambda m, x: m(x), lambda m, x: m(x) * 2], layer, x)


def mapped(module, x):
    del module
    return nn.vmap(
        nn.Dense, in_axes=1, variable_axes={"params": 0}, split_rngs={"params": True}
    )(3, name="layer")(x[..., None])


def custom_vjp(module, x):
    del module

    def forward(layer, x):
        return nn.vjp(lambda m, x: m(x), layer, x)

    def backward(vjp, g):
        of_params, of_x = vjp(g)
        return jax.tree.map(lambda x: 3 * x, of_params), of_x

    layer = nn.Dense(8, name="layer")
    return nn.custom_vjp(lambda m, x: m(x), forward, backward)(layer, x)


def map_variables(module, x):
    del module
    doubled = nn.map_variables(
        nn.Dense, "params", lambda v: jax.tree.map(lambda x: 2 * x, v), init=True
    )
    return doubled(8, name="layer")(x)


def rematerialised(module, x):
    del module
    return nn.remat(nn.Dense)(8, name="layer")(x)


def rematerialised_with_policy(module, x):
    del module
    policy = jax.checkpoint_policies.dots_saveable
    return nn.remat(Carry, policy=policy)(name="layer")(x)[0]


def rematerialised_function(module, x):
    del module
    return nn.remat(lambda layer, x: layer(x))(nn.Dense(8, name="layer"), x)


def jitted(module, x):
    del module
    return nn.jit(nn.Dense)(8, name="layer")(x)


def jitted_user_layer(module, x):
    del module
    return nn.jit(Carry)(name="layer")(x)[0]


LIFTED = [
    scanned,
    scanned_and_rematerialised,
    scanned_function,
    while_loop,
    cond,
    switch,
    mapped,
    custom_vjp,
    map_variables,
    rematerialised,
    rematerialised_with_policy,
    rematerialised_function,
    jitted,
    jitted_user_layer,
]


class Lifted(nn.Module):
    fun: object

    @nn.compact
    def __call__(self, x):
        return self.fun(self, nn.Dense(8, name="before")(x))


@every_second(
    "fun policy",
    LIFTED,
    [HALF, "bf16-true"],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_inside_of_lifted_transformations(fun, policy):
    plain, model = Lifted(fun), apply_policy(Lifted(fun), policy)
    variables, expected = model.init(KEY, X), plain.init(KEY, X)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    stored = jaxmp.get_policy(policy).param_dtype
    assert set(jax.tree.leaves(dtypes(variables))) == {stored}

    def loss(variables):
        return model.apply(variables, X).astype(F32).mean()

    differentiable = fun is not while_loop
    run = jax.value_and_grad(loss) if differentiable else loss
    jaxpr = jax.make_jaxpr(run)(variables)
    assert len(matmuls(jaxpr)) > 1
    assert {d for m in matmuls(jaxpr) for d in (*m.operands, m.output)} == {BF16}
    assert model.apply(variables, X).dtype == BF16
    exact = plain.apply(jax.tree.map(lambda x: x.astype(F32), variables), X)
    np.testing.assert_allclose(
        np.asarray(model.apply(variables, X), np.float32), exact, atol=0.03
    )


@pytest.mark.parametrize("transform", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_methods_that_are_lifted_by_a_decorator(transform):
    class Decorated(nn.Module):
        @transform
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="dense")(x)

    variables = Decorated().init(KEY, X)
    found = [
        model.apply(variables, X).dtype
        for model in (
            Decorated(),
            apply_policy(Decorated(), HALF),
            apply_policy(Decorated(), "p=f32,c=f16,o=f16"),
        )
    ]
    assert found == [F32, BF16, F16]


def test_the_cache_of_nn_jit_knows_the_policy():
    """One jitted class, its model with no policy, with two, and with other rules."""
    inner = nn.jit(Compact)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return inner(name="inner")(x)

    variables = Net().init(KEY, X)
    rules = (PolicyRule(path="inner", output="float32"), *default_rules)
    policies = {
        "none": Net(),
        "bf16": apply_policy(Net(), HALF),
        "f16": apply_policy(Net(), "p=f32,c=f16,o=f16"),
        "rules": apply_policy(Net(), "p=f32,c=bf16,o=f32", rules=rules),
    }
    expected = {"none": F32, "bf16": BF16, "f16": F16, "rules": F32}
    for name in ("none", "bf16", "f16", "rules", "none", "f16", "bf16"):
        assert policies[name].apply(variables, X).dtype == expected[name], name
    exact = Net().apply(variables, X)
    assert not same(policies["rules"].apply(variables, X), exact)


def test_nn_vmap_over_a_model_of_the_user():
    ensemble = nn.vmap(
        Compact,
        in_axes=None,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    model = apply_policy(ensemble(), "bf16-true")
    output, variables = model.init_with_output(KEY, X)
    assert output.dtype == BF16
    assert output.shape == (3, 4, 8)
    assert variables["params"]["layer"]["kernel"].dtype == BF16
    assert variables["params"]["norm"]["scale"].dtype == F32


def test_jax_transformations_around_a_model():
    model = apply_policy(Compact(), HALF)
    variables = model.init(KEY, X)
    assert jax.vmap(model.apply, (None, 0))(variables, X[:, None]).dtype == BF16
    remat = jax.checkpoint(lambda v: model.apply(v, X).astype(F32).sum())
    assert set(jax.tree.leaves(dtypes(jax.grad(remat)(variables)))) == {F32}


def test_a_shared_layer_and_an_embedding_that_is_also_the_head():
    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(16, 8)
            self.block = nn.Dense(8)

        def __call__(self, tokens):
            x = self.embed(tokens)
            return self.embed.attend(self.block(self.block(x)))

    model = apply_policy(Tied(), "mixed_bfloat16")
    tokens = jnp.arange(4)
    variables = model.init(KEY, tokens)
    assert model.apply(variables, tokens).dtype == F32
    jaxpr = jax.make_jaxpr(jax.grad(lambda v: model.apply(v, tokens).sum()))(variables)
    assert {m.output for m in matmuls(jaxpr)} == {BF16}
    assert set(jax.tree.leaves(dtypes(variables))) == {F32}


class LoRA(nn.Module):
    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.ones, (x.shape[-1], 1))
        b = self.param("b", nn.initializers.ones, (1, 8))
        return self.inner(x) + x @ a @ b


@pytest.mark.parametrize("around", ["root", "inside"])
def test_share_scope(around):
    plain = LoRA(nn.Dense(8))
    module = plain if around == "root" else nn.Sequential([plain])
    model = apply_policy(module, "bf16-true")
    output, variables = model.init_with_output(KEY, X)
    assert output.dtype == BF16
    assert set(jax.tree.leaves(dtypes(variables))) == {BF16}
    reference = module.init(KEY, X)
    assert jax.tree.structure(variables) == jax.tree.structure(reference)
    assert dtypes(apply_policy(module, HALF).apply(reference, X)) == BF16


@pytest.mark.parametrize("inner", [nn.Dense(8), nn.Sequential([nn.Dense(8)])])
def test_a_model_under_a_policy_shares_a_scope(inner):
    plain = LoRA(inner).init(KEY, X)
    variables = LoRA(apply_policy(inner, "mixed_bfloat16")).init(KEY, X)
    assert jax.tree.structure(variables) == jax.tree.structure(plain)
