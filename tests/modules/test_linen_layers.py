"""`apply_policy` on the layers that linen ships, and on such as people write."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp import apply_policy
from jaxmp.testing import matmuls

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
HALF = "params=float32,compute=bfloat16,output=bfloat16"
X = jnp.linspace(-1, 1, 32).reshape(4, 8)
KEY = jax.random.key(0)


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Dense(8), X),
        (nn.DenseGeneral((2, 3)), X),
        (nn.Einsum((8, 4), "bd,de->be"), X),
        (nn.Conv(4, (3,)), X[None]),
        (nn.ConvTranspose(4, (3,)), X[None]),
        (nn.ConvLocal(4, (3,)), X[None]),
        (nn.MultiHeadDotProductAttention(2), X[None]),
        (nn.MultiHeadDotProductAttention(2, normalize_qk=True), X[None]),
        (nn.RNN(nn.LSTMCell(4)), X[None]),
        (nn.RNN(nn.OptimizedLSTMCell(4)), X[None]),
        (nn.RNN(nn.GRUCell(4)), X[None]),
        (nn.RNN(nn.SimpleCell(4)), X[None]),
        (nn.RNN(nn.MGUCell(4)), X[None]),
        (nn.RNN(nn.ConvLSTMCell(4, (3,))), X[None, :, :, None]),
        (nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.LSTMCell(4))), X[None]),
        (nn.WeightNorm(nn.Dense(8)), X),
        (nn.SpectralNorm(nn.Dense(8)), X),
        (nn.Sequential([nn.Dense(8), nn.relu, nn.PReLU(), nn.Dense(4)]), X),
        (nn.BatchNorm(False), X),
        (nn.LayerNorm(), X),
        (nn.RMSNorm(), X),
        (nn.GroupNorm(2), X),
        (nn.InstanceNorm(), X[None]),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_layers_of_flax(layer, x):
    class Net(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            needs_more = isinstance(self.layer, nn.SpectralNorm)
            more = {"update_stats": True} if needs_more else {}
            return self.layer(x, **more)

    is_norm = type(layer).__name__ in (
        *("BatchNorm", "LayerNorm", "RMSNorm"),
        *("GroupNorm", "InstanceNorm"),
    )
    plain = Net(layer)
    variables = jax.eval_shape(plain.init, KEY, x)
    for policy in (HALF, "bf16-true"):
        model = apply_policy(Net(layer), policy)
        found = jax.eval_shape(model.init, KEY, x)
        assert jax.tree.structure(found) == jax.tree.structure(variables)
        stored = jaxmp.get_policy(policy).param_dtype
        for path, p in jax.tree_util.tree_leaves_with_path(found["params"]):
            in_float32 = is_norm or "query_ln" in str(path) or "key_ln" in str(path)
            assert p.dtype == (F32 if in_float32 else stored), path
        state = {name: v for name, v in found.items() if name != "params"}
        state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), state)
        assert set(jax.tree.leaves(dtypes(state))) <= {F32}

        def loss(params, model=model, state=state):
            output, _ = model.apply({"params": params, **state}, x, mutable=[*state])
            assert output.dtype == BF16
            return output.astype(F32).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(found["params"])
        found = [m for m in matmuls(jaxpr) if "sigma" not in m.scope]
        halves = {d for m in found for d in (*m.operands, m.output)}
        if type(layer) is not nn.SpectralNorm:  # whose power iteration is in float32
            assert halves == (set() if is_norm else {BF16})


def test_fp8_operations_keep_their_own_state():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)

    x = jnp.ones((16, 16))
    for policy in (HALF, "bf16-true"):
        model = apply_policy(Net(), policy)
        output, variables = model.init_with_output(KEY, x)
        assert output.dtype == BF16
        scales = variables.pop("_overwrite_with_gradient")
        assert set(jax.tree.leaves(dtypes(scales))) == {F32}
        assert jax.tree.leaves(dtypes(variables)) == 2 * [
            jaxmp.get_policy(policy).param_dtype
        ]


def test_partitioned_parameters_stay_partitioned():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param(
                "w",
                nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")),
                (8, 8),
            )
            assert w.dtype == F32  # as it is without a policy; stored in half
            kernel = nn.with_logical_partitioning(nn.initializers.ones, ("a", "b"))
            return nn.Dense(4, kernel_init=kernel, name="dense")(x @ w)

    model = apply_policy(Net(), "bf16-true")
    variables = model.init(KEY, X)
    assert variables["params"]["w"].names == ("in", "out")
    assert variables["params"]["dense"]["kernel"].names == ("a", "b")
    assert set(jax.tree.leaves(dtypes(variables))) == {BF16}
    assert model.apply(variables, X).dtype == BF16


@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("carry_dtype", [F32, BF16], ids=str)
def test_a_cell_hands_its_carry_back_in_its_own_dtype(by_name, carry_dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            carry, cell = jnp.zeros((4, 4), carry_dtype), nn.GRUCell(4)
            carry, y = cell(carry=carry, inputs=x) if by_name else cell(carry, x)
            assert (carry.dtype, y.dtype) == (carry_dtype, F32)
            return y

    assert apply_policy(Net(), HALF).init_with_output(KEY, X)[0].dtype == BF16


def test_a_cell_of_the_user():
    class Cell(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry, x):
            new = nn.tanh(nn.Dense(4)(x) + nn.Dense(4)(carry))
            return new, new

        def initialize_carry(self, rng, input_shape):
            return jnp.zeros((*input_shape[:-1], 4))

        @property
        def num_feature_axes(self):
            return 1

    model = apply_policy(nn.RNN(Cell()), HALF)
    variables = model.init(KEY, X[None])
    assert model.apply(variables, X[None]).dtype == BF16
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, X[None]))(variables)
    assert {d for m in matmuls(jaxpr) for d in m.operands} == {BF16}


def test_options_of_an_rnn():
    model = apply_policy(nn.RNN(nn.LSTMCell(4), return_carry=True), HALF)
    x, lengths = X[None], jnp.array([3])
    variables = model.init(KEY, x)
    carry, y = model.apply(variables, x, seq_lengths=lengths, reverse=True)
    assert y.dtype == BF16
    carry, y = model.apply(variables, x, initial_carry=carry, keep_order=True)
    assert (dtypes(carry), y.dtype) == ((BF16, BF16), BF16)


def test_a_norm_written_by_hand_is_a_norm():
    class RMSNorm(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
            assert x.dtype == scale.dtype == F32
            mean_square = jnp.mean(jnp.square(x), -1, keepdims=True)
            return x * jax.lax.rsqrt(mean_square) * scale[None]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return RMSNorm()(300 * nn.Dense(8)(x))

    x = jnp.ones((4, 8))
    variables = Net().init(KEY, x)
    exact = Net().apply(variables, x)
    half = apply_policy(Net(), "p=f32,c=f16,o=f16").apply(variables, x)
    assert half.dtype == F16
    # In float16 the square of 300 is infinite, and the result would be 0.
    np.testing.assert_allclose(half, exact, rtol=0.01)


def test_gradients_of_a_layer_used_300_times_are_summed_in_float32():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(1, use_bias=False)
            return sum(layer(x) for _ in range(300))

    # A quarter each: summed in bfloat16, 64 + 0.25 stays 64.
    x = jnp.full((1, 1), 0.25)
    model = apply_policy(Net(), "mixed_bfloat16")
    gradient = jax.grad(lambda v: model.apply(v, x)[0, 0])(model.init(KEY, x))
    assert jax.tree.leaves(gradient)[0].item() == 75


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_a_scan_of_5000_steps_are_summed_in_float32(remat):
    class Cell(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry, x):
            return carry, nn.Dense(1, use_bias=False)(x)

        def initialize_carry(self, rng, input_shape):
            return jnp.zeros(input_shape)

        @property
        def num_feature_axes(self):
            return 1

    x = jnp.full((1, 5000, 1), 0.25)
    cell = nn.remat(Cell) if remat else Cell
    model = apply_policy(nn.RNN(cell()), "mixed_bfloat16")
    variables = model.init(KEY, x)
    gradient = jax.grad(lambda v: model.apply(v, x).sum())(variables)
    assert jax.tree.leaves(gradient)[0].item() == 1250
