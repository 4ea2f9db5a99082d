"""A `dtype` that a model hands down, and one that its author meant."""

import dataclasses
import functools
import types
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxmp
from jaxmp import PolicyRule, apply_policy
from jaxmp.errors import InvalidOption, MostlyFloat32Warning, PolicyWithoutEffect
from jaxmp.testing import matmuls

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))


@dataclasses.dataclass(frozen=True)
class Config:
    dtype: Any = jnp.float32
    width: int = 8


@flax.struct.dataclass
class StructConfig:
    compute_dtype: Any = jnp.float32
    inner: Config = Config()


class Dictionary:
    """As configs of ml_collections are: entries are attributes too."""

    def __init__(self, entries):
        object.__setattr__(self, "entries", dict(entries))

    def items(self):
        return self.entries.items()

    def __getitem__(self, name):
        return self.entries[name]

    def __getattr__(self, name):
        if name == "dtype":
            return self.entries[name]
        raise AttributeError(name)


CONFIGS = {
    "dataclass": Config(),
    "names": types.SimpleNamespace(dtype=jnp.float32),
    "string": types.SimpleNamespace(dtype="float32"),
    "dtype": types.SimpleNamespace(dtype=jnp.dtype("float32")),
    "like a dictionary": Dictionary({"dtype": jnp.float32}),
}


class Field(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8, dtype=self.dtype)(x)
        mask = jnp.where(h > 10, jnp.finfo(self.dtype).min, 0).astype(self.dtype)
        return nn.Dense(8, dtype=self.dtype)(h + mask)


class Setup(nn.Module):
    dtype: Any = jnp.float32

    def setup(self):
        self.first = nn.Dense(8, dtype=self.dtype)
        self.blocks = [nn.Dense(8, dtype=self.dtype), nn.remat(Field)(self.dtype)]

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Partial(nn.Module):
    dtype: Any = jnp.float32
    layer: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(self.layer, 8, dtype=self.dtype)
        return dense()(nn.relu(dense()(x)))


class PartialField(nn.Module):
    layer: Any = functools.partial(nn.Dense, dtype=jnp.float32)

    @nn.compact
    def __call__(self, x):
        return self.layer(8)(x)


class Configured(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, dtype=self.config.dtype)(x)


class Nested(nn.Module):
    """Hands nothing down itself; the block declares float32 because it has to."""

    @nn.compact
    def __call__(self, x):
        return Field()(x)


class Property(nn.Module):
    config: Any = StructConfig()

    @property
    def dtype(self):
        return self.config.inner.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype)(x)
        return nn.Dense(8, dtype=self.config.compute_dtype)(x)


class Scanned(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            dtype: Any

            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(8, dtype=self.dtype)(x), None

        scan = nn.scan(
            nn.remat(Step),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(self.dtype)(x.astype(self.dtype), None)[0]


LINEN = [
    Field(),
    Setup(),
    Partial(),
    PartialField(),
    Nested(),
    Property(),
    Scanned(),
    *(Configured(config) for config in CONFIGS.values()),
]


@pytest.mark.parametrize("model", LINEN, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_matmul_is_in_half(model, dtype):
    before = repr(model)
    params = model.init(KEY, X)
    policied = apply_policy(model, f"mixed_{dtype}")
    made = policied.init(KEY, X)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: policied.apply(p, X).sum()))(params)
    assert {m.output for m in matmuls(jaxpr)} == {dtype}
    assert policied.apply(params, X).dtype == F32
    assert repr(model) == before
    assert {m.output for m in matmuls(jax.make_jaxpr(model.apply)(params, X))} == {F32}


def test_the_configs_of_the_caller_are_untouched():
    config = types.SimpleNamespace(dtype=jnp.float32)
    apply_policy(Configured(config), "mixed_bfloat16").init(KEY, X)
    assert config.dtype is jnp.float32


def test_parameter_dtypes_are_handed_down_too():
    class Net(nn.Module):
        param_dtype: Any = jnp.float32

        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, param_dtype=self.param_dtype)(x)

    params = apply_policy(Net(), "bf16-true").init(KEY, X)["params"]
    assert params["Dense_0"]["kernel"].dtype == BF16


class WithHead(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, dtype=self.dtype, name="body")(x)
        x = nn.Dense(8, name="plain")(x)
        return nn.Dense(2, dtype=jnp.float32, name="head")(x)


def test_what_is_hard_coded_stays_and_is_told_apart():
    params = WithHead().init(KEY, X)
    model = apply_policy(WithHead(), "mixed_bfloat16")
    jaxpr = jax.make_jaxpr(model.apply)(params, X)
    assert [m.output for m in matmuls(jaxpr)] == [BF16, BF16, F32]
    rows = {r.path: r for r in jaxmp.describe(WithHead(), "mixed_bfloat16", X).rows}
    assert {path: row.rule for path, row in rows.items()} == {
        "": "policy",
        "body": "handed down",
        "plain": "policy",
        "head": "author's dtype",
    }
    rules = (PolicyRule(path="head", compute="bfloat16"),)
    rows = jaxmp.describe(WithHead(), "mixed_bfloat16", X, rules=rules).rows
    assert {r.path: r.rule for r in rows}["head"] == "path='head'"


@pytest.mark.parametrize(
    ("explicit_dtype", "dtypes"),
    [("override", [BF16, BF16, BF16]), ("keep", [F32, BF16, F32])],
)
def test_either_can_be_forced(explicit_dtype, dtypes):
    params = WithHead().init(KEY, X)
    model = apply_policy(WithHead(), "mixed_bfloat16", explicit_dtype=explicit_dtype)
    with pytest.warns(MostlyFloat32Warning) if explicit_dtype == "keep" else _nothing():
        jaxpr = jax.make_jaxpr(model.apply)(params, X)
    assert [m.output for m in matmuls(jaxpr)] == dtypes


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_an_option_that_does_not_exist():
    with pytest.raises(InvalidOption, match=r"own_code='no'.*'autocast', 'half'"):
        apply_policy(Field(), "mixed_bfloat16", own_code="no")
    with pytest.raises(InvalidOption, match=r"explicit_dtype='no'.*'override', 'keep'"):
        apply_policy(Field(), "mixed_bfloat16", explicit_dtype="no")


def test_a_rule_on_a_block_is_handed_down_in_it():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Field(name="b")(Field(name="a")(x))

    rules = (PolicyRule(path="a", compute="float32"),)
    params = Net().init(KEY, X)
    model = apply_policy(Net(), "mixed_bfloat16", rules=rules)
    jaxpr = jax.make_jaxpr(model.apply)(params, X)
    assert [m.output for m in matmuls(jaxpr)] == [F32, F32, BF16, BF16]


# nnx: the layers are built already.


class Attribute(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.dtype = dtype
        self.first = nnx.Linear(8, 8, dtype=dtype, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x.astype(self.dtype)))


class Everywhere(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.norm = nnx.LayerNorm(8, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [nnx.Linear(8, 8, dtype=dtype, rngs=rngs) for _ in range(2)]
        )

    def __call__(self, x):
        for block in self.blocks:
            x = self.norm(block(x))
        return x


class InConfig(nnx.Module):
    def __init__(self, rngs):
        self.config = Config()
        self.first = nnx.Linear(8, 8, dtype=self.config.dtype, rngs=rngs)
        self.plain = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.plain(self.first(x))


@pytest.mark.parametrize("cls", [Attribute, Everywhere, InConfig])
def test_nnx_layers_that_were_handed_float32(cls):
    original = cls(nnx.Rngs(0))
    model = apply_policy(original, "mixed_bfloat16")
    jaxpr = jax.make_jaxpr(lambda m, x: m(x))(model, X)
    assert {m.output for m in matmuls(jaxpr)} == {BF16}
    assert model(X).dtype == F32
    assert {m.output for m in matmuls(jax.make_jaxpr(lambda m: m(X))(original))} == {
        F32
    }
    again = apply_policy(model, "mixed_float16")
    assert {m.output for m in matmuls(jax.make_jaxpr(lambda m: m(X))(again))} == {F16}


def test_an_nnx_layer_that_alone_says_float32_means_it():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(8, 64, rngs=rngs)
            self.head = nnx.Linear(64, 2, dtype=jnp.float32, rngs=rngs)

        def __call__(self, x):
            return self.head(self.body(x))

    model = apply_policy(Net(nnx.Rngs(0)), "mixed_bfloat16")
    jaxpr = jax.make_jaxpr(lambda m: m(X))(model)
    assert [m.output for m in matmuls(jaxpr)] == [BF16, F32]
    rows = {r.path: r.rule for r in jaxmp.describe(model, "mixed_bfloat16").rows}
    assert rows == {"": "policy", "body": "policy", "head": "author's dtype"}


# No policy without effect.


class HardCoded(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=jnp.float32, name="a")(x)
        return nn.Dense(8, dtype=jnp.float32, name="b")(x)


class HardCodedOwn(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (8, 8))
        return jnp.dot(x, w, precision="highest")


def test_a_policy_that_changes_nothing_is_an_error():
    model = apply_policy(HardCoded(), "mixed_bfloat16")
    match = r"leaves every matmul of HardCoded.*a \(Dense\).*explicit_dtype='override'"
    with pytest.raises(PolicyWithoutEffect, match=match):
        model.init(KEY, X)
    with pytest.raises(PolicyWithoutEffect, match=match):
        apply_policy(HardCoded(), "mixed_float16").apply(HardCoded().init(KEY, X), X)
    half = apply_policy(HardCoded(), "mixed_bfloat16", own_code="half")
    for _ in range(2):
        with pytest.raises(PolicyWithoutEffect, match=match):
            half.init(KEY, X)
    own = apply_policy(HardCodedOwn(), "mixed_bfloat16")
    with pytest.raises(
        PolicyWithoutEffect, match=r"precision=HIGHEST.*test_handed_dow"
    ):
        own.apply(HardCodedOwn().init(KEY, X), X)
    with pytest.raises(PolicyWithoutEffect, match=r"blocks_0 \(Linear\)"):
        apply_policy(Everywhere(nnx.Rngs(0)), "mixed_bfloat16", explicit_dtype="keep")


def test_no_error_where_it_is_meant_or_has_an_effect():
    params = HardCoded().init(KEY, X)
    rules = (PolicyRule(kind="dense", compute="float32"),)
    for policy, options in (
        ("float32", {}),
        ("mixed_bfloat16", {"rules": rules}),
        ("mixed_bfloat16", {"explicit_dtype": "override"}),
    ):
        apply_policy(HardCoded(), policy, **options).apply(params, X)
    nnx_model = apply_policy(Everywhere(nnx.Rngs(0)), "mixed_bfloat16", rules=rules)
    assert {m.output for m in matmuls(jax.make_jaxpr(lambda m: m(X))(nnx_model))} == {
        F32
    }
    assert jaxmp.describe(HardCoded(), "mixed_bfloat16", X).rows

    class NoMatmul(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("b", nn.initializers.zeros, (4, 8))

    apply_policy(NoMatmul(), "mixed_bfloat16").init(KEY, X)


def test_most_parameters_in_float32_are_said_once():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Dense(64, dtype=jnp.float32, name="big")(x))

    model = apply_policy(Net(), "mixed_bfloat16")
    with pytest.warns(MostlyFloat32Warning, match=r"big \(Dense\) of Net hold 82%"):
        params = model.init(KEY, X)
    model.apply(params, X)  # warnings are errors here
