"""`apply_policy` on nnx modules: the new graph, and every way of using it."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxmp
from jaxmp import apply_policy
from jaxmp.testing import matmuls

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
HALF = "params=float32,compute=bfloat16,output=bfloat16"
X = jax.random.normal(jax.random.key(0), (32, 8))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(nnx.relu(self.dense(x)))


class Model(nnx.Module):
    """Layers in a field and a list, a parameter, a counter and a random stream."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.scale = nnx.Param(jnp.ones(8))
        self.calls = nnx.Variable(jnp.int32(0))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def encode(self, x):
        for block in self.blocks:
            x = block(x)
        return x * self.scale[...][None]

    def __call__(self, x):
        self.calls[...] += 1
        return self.head(self.dropout(self.encode(x)))


def make(policy=HALF, **kwargs):
    return apply_policy(Model(nnx.Rngs(0)), policy, **kwargs)


def values(module, *filters):
    state = nnx.to_flat_state(nnx.state(module, *filters))
    return {"/".join(map(str, path)): variable[...] for path, variable in state}


def dtypes(module, *filters):
    return {path: value.dtype for path, value in values(module, *filters).items()}


def same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert bool(jnp.all(a[path] == b[path])), path


# The graph.


def test_the_original_is_untouched():
    original = Model(nnx.Rngs(0))
    before, attributes = values(original), dict(vars(original.head))
    model = apply_policy(original, "bf16-true")
    model(X)
    same(before, values(original))
    assert vars(original.head) == attributes
    assert type(original) is Model
    assert type(original.head) is nnx.Linear
    assert original(X).dtype == F32


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bf16-true"])
def test_same_class_same_paths_and_parameters_in_their_dtype(policy):
    original, model = Model(nnx.Rngs(0)), make(policy)
    assert isinstance(model, Model)
    assert type(model).__name__ == "Model"
    assert values(model).keys() == values(original).keys()
    stored = jaxmp.get_policy(policy).param_dtype
    for path, dtype in dtypes(model, nnx.Param).items():
        assert dtype == (F32 if "norm" in path else stored), path
    others = nnx.Not(nnx.Param)
    same(values(model, others), values(original, others))
    assert model(X).dtype == jaxmp.get_policy(policy).output_dtype


def test_methods_and_layers():
    model = make("mixed_bfloat16")
    assert model(X).dtype == F32
    assert model.encode(X).dtype == F32
    assert model.blocks[0](X).dtype == BF16
    assert model.blocks[0].dense(X).dtype == BF16
    assert model.head(X).dtype == BF16
    assert model.head.kernel[...].dtype == F32


def test_shared_layers_and_parameters_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(8, 8, rngs=rngs)
            self.b = self.a
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.table = self.embed.embedding

        def __call__(self, x):
            return self.embed.attend(self.b(self.a(x)))

    model = apply_policy(Tied(nnx.Rngs(0)), "bf16-true")
    assert model.a is model.b
    assert model.table is model.embed.embedding
    assert set(dtypes(model)) == {"a/bias", "a/kernel", "embed/embedding"}
    assert model(X).dtype == BF16


def test_abstract_modules():
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    graph, _ = nnx.split(apply_policy(abstract, "bf16-true"))
    concrete_graph, state = nnx.split(make("bf16-true"))
    assert graph == concrete_graph
    assert nnx.merge(graph, state)(X).dtype == BF16
    shapes = nnx.state(apply_policy(abstract, "bf16-true"), nnx.Param)
    assert shapes["head"]["kernel"].dtype == BF16
    assert shapes["head"]["kernel"].shape == (8, 2)


@pytest.mark.devices(8)
def test_sharded_modules():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    class Sharded(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(
                nnx.initializers.lecun_normal(), ("data", None)
            )
            self.dense = nnx.Linear(8, 4, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.dense(x)

    with jax.set_mesh(mesh):
        original = Sharded(nnx.Rngs(0))
        model = apply_policy(original, "bf16-true")
        kernel = model.dense.kernel
        assert kernel[...].dtype == BF16
        assert kernel[...].sharding == original.dense.kernel[...].sharding
        assert kernel[...].sharding.spec == PartitionSpec("data", None)
        spec = nnx.get_partition_spec(nnx.state(model))["dense"]["kernel"]
        assert spec.get_value() == PartitionSpec("data", None)
        assert model(X).dtype == BF16


@pytest.mark.parametrize(
    "duplicate",
    [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, nnx.clone],
    ids=["pickle", "deepcopy", "clone"],
)
def test_copies_keep_the_policy(duplicate):
    model = make("mixed_float16")
    model.eval()
    again = duplicate(model)
    assert type(again) is type(model)
    np.testing.assert_array_equal(again(X), model(X))
    assert again.blocks[0](X).dtype == F16


def test_policies_applied_twice_the_outer_one_holds():
    twice = apply_policy(make("bf16-true"), "mixed_float16")
    assert type(twice) is type(make("mixed_float16"))
    assert dtypes(twice) == dtypes(make("mixed_float16"))
    assert twice.blocks[0](X).dtype == F16
    assert nnx.split(twice)[0] == nnx.split(make("mixed_float16"))[0]


def test_a_float32_policy_takes_a_policy_off():
    plain = Model(nnx.Rngs(0))
    again = apply_policy(make(HALF), "float32")
    for module in (plain, again):
        module.eval()
    np.testing.assert_array_equal(again(X), plain(X))


def test_a_model_in_a_model_without_policy():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.half = apply_policy(nnx.Linear(8, 8, rngs=rngs), HALF)
            self.full = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.half(x), self.full(x)

    inner, outer = Outer(nnx.Rngs(0))(X)
    assert (inner.dtype, outer.dtype) == (BF16, F32)
    all_half = apply_policy(Outer(nnx.Rngs(0)), "p=f32,c=f16,o=f16")(X)
    assert {x.dtype for x in all_half} == {F16}


# Training.


def train(model, transform, value_and_grad, traces=None):
    """Ten steps; returns the losses and the last gradients."""
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    scaled = value_and_grad is not nnx.value_and_grad

    @nnx.jit
    def step(model, optimizer):
        if traces is not None:
            traces.append(model)
        more = (optimizer,) if scaled else ()
        differentiate = value_and_grad(lambda m: jnp.mean(m(X) ** 2))
        loss, grads = differentiate(model, *more)
        optimizer.update(model, grads)
        return loss, grads

    losses = []
    for _ in range(10):
        loss, grads = step(model, optimizer)
        losses.append(loss)
    return losses, grads


def test_training_under_jit_compiles_once_and_changes_no_dtype():
    model, traces = make("mixed_bfloat16"), []
    before = dtypes(model)
    losses, grads = train(model, optax.sgd(0.1), nnx.value_and_grad, traces)
    assert len(traces) == 1
    assert dtypes(model) == before
    assert {x.dtype for x in jax.tree.leaves(grads)} == {F32}
    assert model.calls[...] == 10
    assert model.dropout.rngs.count[...] == 10
    plain, _ = train(Model(nnx.Rngs(0)), optax.sgd(0.1), nnx.value_and_grad)
    np.testing.assert_allclose(losses, plain, rtol=0.05)


def test_loss_scaling_with_an_nnx_optimizer():
    def value_and_grad(loss_fn):
        scaled = jaxmp.value_and_grad(loss_fn, transform=nnx.value_and_grad)
        return lambda model, optimizer: scaled(model, loss_scale=optimizer)

    model = make("mixed_float16")
    optimizer = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16", init_scale=2.0**10)
    losses, _ = train(model, optimizer, value_and_grad)
    plain, _ = train(Model(nnx.Rngs(0)), optax.sgd(0.1), nnx.value_and_grad)
    np.testing.assert_allclose(losses, plain, rtol=0.01)


def test_every_matmul_is_in_half_and_every_gradient_in_float32():
    graph, params, rest = nnx.split(make(HALF), nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest, copy=True)
        return model(X).astype(F32).mean()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    assert {d for m in matmuls(jaxpr) for d in (*m.operands, m.output)} == {BF16}
    assert {x.dtype for x in jaxpr.out_avals} == {F32}


def test_filters_by_type_of_variable():
    lora = nnx.LoRALinear(8, 4, lora_rank=2, rngs=nnx.Rngs(0))
    model = apply_policy(lora, "params=bfloat16,compute=bfloat16,output=float32")
    of_lora = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: m(X).sum(), argnums=of_lora)(model)
    assert set(nnx.to_pure_dict(grads)) == {"lora"}


def test_statistics_equal_those_of_float32():
    x = (100 * X).astype(BF16).astype(F32)
    plain = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    model = apply_policy(nnx.BatchNorm(8, rngs=nnx.Rngs(0)), HALF)
    for _ in range(3):
        plain(x)
        model(x)
    same(values(plain), values(model))


def test_dropout_draws_what_it_draws_in_float32():
    plain = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model = apply_policy(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), HALF)
    for _ in range(2):
        kept, kept_in_half = plain(X) != 0, model(X) != 0
        np.testing.assert_array_equal(kept, kept_in_half)


def test_train_and_eval():
    model = make(HALF)
    assert not np.array_equal(model(X), model(X))
    model.eval()
    statistics = values(model, nnx.BatchStat)
    np.testing.assert_array_equal(model(X), model(X))
    same(statistics, values(model, nnx.BatchStat))
    view = nnx.view(model, deterministic=False, use_running_average=False)
    assert view(X).dtype == BF16
    model.train()
    assert not np.array_equal(model(X), model(X))


def test_what_a_module_sets_in_its_variables_is_kept():
    class Writer(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(8))
            self.mean = nnx.BatchStat(jnp.zeros(8))
            self.replaced = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            self.weight[...] = 2 * self.weight[...]
            self.mean[...] = x.mean(0)
            self.replaced = nnx.Param(jnp.zeros(4))
            return x * self.weight[...][None]

    model = apply_policy(Writer(), HALF)
    np.testing.assert_array_equal(model(X), 2 * X.astype(BF16))
    assert dtypes(model) == {"weight": F32, "mean": F32, "replaced": F32}
    assert model.weight[...][0] == 2
    assert model.replaced.shape == (4,)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_cache_keeps_its_own_dtype(dtype):
    def decode(model):
        return [model(X[:2, None] * (i + 1)) for i in range(3)]

    def attention():
        layer = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
        layer.init_cache((2, 5, 8), dtype=dtype)
        return layer

    model = apply_policy(attention(), "mixed_bfloat16")
    plain = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
    plain.init_cache((2, 5, 8))
    for y, expected in zip(decode(model), decode(plain), strict=True):
        assert y.dtype == F32
        np.testing.assert_allclose(y, expected, atol=0.05)
    found = dtypes(model, nnx.Cache)
    assert found == {
        "cached_key": dtype,
        "cached_value": dtype,
        "cache_index": jnp.int32,
    }
    assert model.cache_index[...] == 3
    cached = model.cached_key[...].astype(F32)
    np.testing.assert_allclose(cached, plain.cached_key[...], atol=0.05)


# Transformations.


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = stacked(rngs)

    def __call__(self, x):
        raise NotImplementedError


def over_layers(layers, x):
    scan = nnx.scan(
        lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
    )
    return scan(layers, x)


def over_rematerialised_layers(layers, x):
    scan = nnx.scan(
        nnx.remat(lambda layer, x: layer(x)),
        in_axes=(0, nnx.Carry),
        out_axes=nnx.Carry,
    )
    return scan(layers, x)


def mapped(layers, x):
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)


def jitted(layers, x):
    return nnx.jit(over_layers)(layers, x)


@pytest.mark.parametrize(
    "fun", [over_layers, over_rematerialised_layers, mapped, jitted]
)
def test_inside_of_transformations(fun):
    class Net(Stack):
        def __call__(self, x):
            return fun(self.layers, x)

    model, plain = apply_policy(Net(nnx.Rngs(0)), HALF), Net(nnx.Rngs(0))
    assert model(X).dtype == BF16
    np.testing.assert_allclose(model(X).astype(F32), plain(X), atol=0.05)
    graph, params = nnx.split(model)

    def loss(params):
        return nnx.merge(graph, params, copy=True)(X).astype(F32).mean()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    assert {d for m in matmuls(jaxpr) for d in (*m.operands, m.output)} == {BF16}


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat], ids=["jit", "remat"])
def test_methods_that_are_transformed_by_a_decorator(transform):
    class Decorated(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(8))
            self.norm = nnx.BatchNorm(8, rngs=rngs)

        @transform
        def __call__(self, x):
            assert x.dtype == self.scale[...].dtype
            return self.norm(self.dense(x) * self.scale[...][None])

    plain = Decorated(nnx.Rngs(0))
    assert plain(X).dtype == F32
    model = apply_policy(plain, "mixed_bfloat16")
    before = model.norm.mean[...]
    assert model(X).dtype == F32
    assert not np.array_equal(before, model.norm.mean[...])
    assert apply_policy(plain, "p=f32,c=bf16,o=f16")(X).dtype == F16


def test_other_members_of_a_class():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)

        @property
        def width(self):
            return self.dense.out_features

        @staticmethod
        def twice(x):
            return 2 * x

        @classmethod
        def name(cls):
            return cls.__name__

        def _private(self, x):
            return self.dense(x)

        def __call__(self, x, *, scale=2.0):
            assert isinstance(scale, float)
            return self._private(self.twice(x)) * scale

    model = apply_policy(Net(nnx.Rngs(0)), HALF)
    assert model(X, scale=3.0).dtype == BF16
    assert (model.width, model.name(), model.twice(3)) == (8, "Net", 6)


def test_an_error_inside_leaves_nothing_behind():
    class Net(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            if x.shape[-1] != 8:
                raise ValueError("wrong width")
            return x * self.weight[...][None]

    model = apply_policy(Net(), HALF)
    weight = model.weight
    with pytest.raises(ValueError, match="wrong width"):
        model(X[:, :3])
    assert model.weight is weight
    assert model.weight[...].dtype == F32
    assert model(X).dtype == BF16


def test_integers_keys_and_flags_pass_untouched():
    seen = []

    class Net(nnx.Module):
        def __call__(self, tokens, mask, key, x, scale, train):
            seen.extend([tokens.dtype, mask.dtype, key.dtype, x.dtype, scale, train])
            return tokens, mask, x

    key, tokens, mask = jax.random.key(0), jnp.arange(4), jnp.ones(4, bool)
    model = apply_policy(Net(), HALF)
    result = model(tokens, mask, key, np.ones(4, np.float32), 0.5, True)
    assert seen == [tokens.dtype, mask.dtype, key.dtype, F32, 0.5, True]
    assert [x.dtype for x in result] == [tokens.dtype, mask.dtype, BF16]
