"""`apply_policy` on the layers that nnx ships, rules, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmp
from jaxmp import PolicyRule, apply_policy, default_rules
from jaxmp.errors import NotAModule, UnusedRule
from jaxmp.policy import head_in_float32, matmuls_in_half
from jaxmp.testing import equations, matmuls
from tests.support.thinning import every_second

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
HALF = "params=float32,compute=bfloat16,output=bfloat16"
X = jax.random.normal(jax.random.key(0), (4, 8))
NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


def rngs():
    return nnx.Rngs(0)


def dtypes(module, *filters):
    state = nnx.to_flat_state(nnx.state(module, *filters))
    return {"/".join(map(str, path)): variable.dtype for path, variable in state}


def bidirectional():
    cells = nnx.GRUCell(8, 4, rngs=rngs()), nnx.LSTMCell(8, 4, rngs=rngs())
    return nnx.Bidirectional(*(nnx.RNN(cell, rngs=rngs()) for cell in cells))


def attention(**options):
    return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs(), **options)


LAYERS = {
    "Linear": lambda: nnx.Linear(8, 4, rngs=rngs()),
    "LinearGeneral": lambda: nnx.LinearGeneral(8, (2, 3), rngs=rngs()),
    "Einsum": lambda: nnx.Einsum("bd,de->be", (8, 4), (4,), rngs=rngs()),
    "Conv": lambda: nnx.Conv(8, 4, (3,), rngs=rngs()),
    "ConvTranspose": lambda: nnx.ConvTranspose(8, 4, (3,), rngs=rngs()),
    "attention": attention,
    "attention_dropout": lambda: attention(dropout_rate=0.5, deterministic=False),
    "attention_grouped": lambda: attention(num_kv_heads=1),
    "attention_normalised": lambda: attention(normalize_qk=True),
    "LSTMCell": lambda: nnx.RNN(nnx.LSTMCell(8, 4, rngs=rngs()), rngs=rngs()),
    "OptimizedLSTMCell": lambda: nnx.RNN(
        nnx.OptimizedLSTMCell(8, 4, rngs=rngs()), rngs=rngs()
    ),
    "GRUCell": lambda: nnx.RNN(nnx.GRUCell(8, 4, rngs=rngs()), rngs=rngs()),
    "SimpleCell": lambda: nnx.RNN(nnx.SimpleCell(8, 4, rngs=rngs()), rngs=rngs()),
    "Bidirectional": bidirectional,
    "LoRA": lambda: nnx.LoRA(8, 2, 4, rngs=rngs()),
    "LoRALinear": lambda: nnx.LoRALinear(8, 4, lora_rank=2, rngs=rngs()),
    "WeightNorm": lambda: nnx.WeightNorm(nnx.Linear(8, 4, rngs=rngs()), rngs=rngs()),
    "SpectralNorm": lambda: nnx.SpectralNorm(
        nnx.Linear(8, 4, rngs=rngs()), rngs=rngs()
    ),
    "Sequential": lambda: nnx.Sequential(
        nnx.Linear(8, 4, rngs=rngs()), nnx.relu, nnx.PReLU()
    ),
    "BatchNorm": lambda: nnx.BatchNorm(8, rngs=rngs()),
    "LayerNorm": lambda: nnx.LayerNorm(8, rngs=rngs()),
    "RMSNorm": lambda: nnx.RMSNorm(8, rngs=rngs()),
    "GroupNorm": lambda: nnx.GroupNorm(8, 2, rngs=rngs()),
    "InstanceNorm": lambda: nnx.InstanceNorm(8, rngs=rngs()),
}


class Net(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


@every_second("name policy", LAYERS, [HALF, "bf16-true"])
def test_layers_of_flax(name, policy):
    plain = Net(LAYERS[name]())
    model = apply_policy(plain, policy)
    x = X[None] if name not in ("Einsum", *(norm.__name__ for norm in NORMS)) else X
    x = x[None] if name == "InstanceNorm" else x
    stored = jaxmp.get_policy(policy).param_dtype
    for path, dtype in dtypes(model, nnx.Param).items():
        in_float32 = isinstance(plain.layer, NORMS) or "_ln" in path
        assert dtype == (F32 if in_float32 else stored), path
    before = dtypes(model)
    expected, found = plain(x), model(x)
    assert found.dtype == BF16
    assert dtypes(model) == before
    np.testing.assert_allclose(found.astype(F32), expected, atol=0.06)

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest, copy=True)
        return model(x).astype(F32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    halves = {d for m in matmuls(jaxpr) for d in (*m.operands, m.output)}
    if name != "SpectralNorm":  # whose power iteration is in float32
        assert halves == (set() if isinstance(plain.layer, NORMS) else {BF16})
    exponentials = [e for _, e in equations(jaxpr) if e.primitive.name == "exp"]
    assert {e.invars[0].aval.dtype for e in exponentials} <= {F32}
    assert bool(exponentials) == name.startswith("attention")


@pytest.mark.parametrize("attend_to_all", [True, False])
def test_attention_gives_what_flax_gives(attend_to_all):
    """In float32, with every option, since the function is not Flax's own."""
    mask = None if attend_to_all else nnx.make_causal_mask(jnp.ones((1, 4)))
    options = [
        {},
        {"dropout_rate": 0.5, "deterministic": False},
        {"dropout_rate": 0.5, "deterministic": False, "broadcast_dropout": False},
        {"dropout_rate": 0.5, "deterministic": True},
        {"num_kv_heads": 1},
    ]
    for chosen in options:
        plain, model = attention(**chosen), apply_policy(attention(**chosen), "float32")
        for _ in range(2):
            expected = plain(X[None], mask=mask)
            np.testing.assert_allclose(model(X[None], mask=mask), expected, atol=1e-5)
    weights = []
    for layer in (attention(), apply_policy(attention(), "float32")):
        run = nnx.capture(
            lambda layer, x: layer(x, mask=mask, sow_weights=True), nnx.Intermediate
        )
        weights.append(nnx.to_pure_dict(run(layer, X[None])[1])["attention_weights"][0])
    np.testing.assert_allclose(*weights, atol=1e-6)


@pytest.mark.parametrize("carry_dtype", [F32, BF16], ids=str)
def test_a_cell_hands_its_carry_back_in_its_own_dtype(carry_dtype):
    class Step(nnx.Module):
        def __init__(self):
            self.cell = nnx.GRUCell(8, 4, rngs=rngs())

        def __call__(self, x, by_name):
            carry = jnp.zeros((4, 4), carry_dtype)
            if by_name:
                carry, y = self.cell(carry=carry, inputs=x)
            else:
                carry, y = self.cell(carry, x)
            assert (carry.dtype, y.dtype) == (carry_dtype, F32)
            return y

    for by_name in (False, True):
        assert apply_policy(Step(), HALF)(X, by_name).dtype == BF16


def test_options_of_an_rnn():
    rnn = nnx.RNN(nnx.LSTMCell(8, 4, rngs=rngs()), return_carry=True, rngs=rngs())
    model = apply_policy(rnn, HALF)
    carry, y = model(X[None], seq_lengths=jnp.array([3]), reverse=True)
    assert y.dtype == BF16
    carry, y = model(X[None], initial_carry=carry)
    assert (carry[0].dtype, y.dtype) == (BF16, BF16)


class Block(nnx.Module):
    def __init__(self, dtype=None):
        self.query = nnx.Linear(8, 8, dtype=dtype, rngs=rngs())
        self.norm = nnx.LayerNorm(8, dtype=dtype, rngs=rngs())

    def __call__(self, x):
        return self.norm(self.query(x))


class Model(nnx.Module):
    def __init__(self, dtype=None):
        self.blocks = nnx.List([Block(dtype), Block(dtype)])
        self.head = nnx.Linear(8, 2, dtype=dtype, rngs=rngs())

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def outputs(rules, policy=HALF, dtype=None):
    model = apply_policy(Model(dtype), policy, rules=rules)
    return {
        "query_0": model.blocks[0].query(X).dtype,
        "query_1": model.blocks[1].query(X).dtype,
        "norm_0": model.blocks[0].norm(X).dtype,
        "block_0": model.blocks[0](X).dtype,
        "head": model.head(X).dtype,
    }


@pytest.mark.parametrize(
    ("rule", "in_float32"),
    [
        (PolicyRule(path="blocks_0/query", output="float32"), {"query_0"}),
        (PolicyRule(path=".*/query", output="float32"), {"query_0", "query_1"}),
        (
            PolicyRule(module_type="Linear", output="float32"),
            {"query_0", "query_1", "head"},
        ),
        (
            PolicyRule(module_type=nnx.Linear, path="head", output="float32"),
            {"head"},
        ),
        (PolicyRule(kind="norm", output="float32"), {"norm_0"}),
        (
            PolicyRule(where=lambda path, m: isinstance(m, Block), output="float32"),
            {"block_0"},
        ),
        # What a rule leaves out is inherited by the layers inside.
        (PolicyRule(path="blocks_0", compute="float32"), {"query_0", "norm_0"}),
    ],
    ids=["path", "regex", "name", "class", "kind", "where", "inherited"],
)
def test_rules(rule, in_float32):
    found = outputs((rule, *default_rules))
    assert {name for name, dtype in found.items() if dtype == F32} == in_float32


def test_ready_made_rules():
    heads = outputs((*head_in_float32("head"), *default_rules))
    assert [name for name, dtype in heads.items() if dtype == F32] == ["head"]
    found = outputs(matmuls_in_half("bfloat16"), policy="float32")
    assert set(found.values()) == {F32}
    model = apply_policy(Model(), "float32", rules=matmuls_in_half("bfloat16"))
    assert {m.output for m in matmuls(jax.make_jaxpr(model)(X))} == {BF16}
    model = apply_policy(Model(), "bf16-true", rules=())
    assert set(dtypes(model).values()) == {BF16}


def test_an_authors_dtype_yields_to_a_users_rule_only():
    by_default = outputs(default_rules, dtype=F16)
    assert by_default["query_0"] == by_default["norm_0"] == by_default["head"] == F16
    rule = PolicyRule(path="blocks_0/.*", compute="bfloat16")
    by_rule = outputs((rule, *default_rules), dtype=F16)
    assert (by_rule["query_0"], by_rule["query_1"]) == (BF16, F16)
    kept = apply_policy(nnx.Linear(8, 4, param_dtype=F16, rngs=rngs()), HALF)
    assert set(dtypes(kept).values()) == {F16}


def test_a_rule_that_matches_nothing():
    rules = (PolicyRule(path="blocks_0/key", compute="float32"), *default_rules)
    with pytest.raises(UnusedRule, match="Nearest paths: blocks_"):
        apply_policy(Model(), HALF, rules=rules)
    allowed = PolicyRule(path="key", compute="float32", allow_unused=True)
    assert apply_policy(Model(), HALF, rules=(allowed,))(X).dtype == BF16


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Model, "Model is a class, and apply_policy"),
        (nnx.state(Block()), "looks like variables"),
        (nnx.relu, "autocast"),
    ],
    ids=["class", "state", "function"],
)
def test_what_is_no_module(module, words):
    with pytest.raises(NotAModule, match=words):
        apply_policy(module, HALF)


def test_gradients_of_a_layer_used_300_times_are_summed_in_float32():
    class Repeated(Net):
        def __call__(self, x):
            return sum(self.layer(x) for _ in range(300))

    # A quarter each: summed in bfloat16, 64 + 0.25 stays 64.
    x = jnp.full((1, 1), 0.25)
    layer = nnx.Linear(1, 1, use_bias=False, rngs=rngs())
    model = apply_policy(Repeated(layer), "mixed_bfloat16")
    gradient = nnx.grad(lambda m: m(x)[0, 0])(model)
    assert jax.tree.leaves(gradient)[0].item() == 75


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_a_scan_of_5000_steps_are_summed_in_float32(remat):
    class Repeated(Net):
        def __call__(self, xs):
            def step(layer, x):
                return layer(x)

            step = nnx.remat(step) if remat else step
            return nnx.scan(step, in_axes=(None, 0), out_axes=0)(self.layer, xs)

    x = jnp.full((5000, 1, 1), 0.25)
    layer = nnx.Linear(1, 1, use_bias=False, rngs=rngs())
    model = apply_policy(Repeated(layer), "mixed_bfloat16")
    gradient = nnx.grad(lambda m: m(x).sum())(model)
    assert jax.tree.leaves(gradient)[0].item() == 1250


def test_gradients_of_an_rnn_of_5000_steps_are_summed_in_float32():
    cell = nnx.SimpleCell(1, 1, activation_fn=lambda x: x, rngs=rngs())
    cell.dense_h.kernel[...] = jnp.zeros((1, 1))
    model = apply_policy(nnx.RNN(cell, rngs=rngs()), "mixed_bfloat16")
    x = jnp.full((1, 5000, 1), 0.25)
    gradient = nnx.grad(lambda m: m(x).sum())(model)
    assert gradient["cell"]["dense_i"]["kernel"][...].item() == 1250


class LinearLayerNorm(nnx.Module):
    """Called a norm for the norm in it."""

    def __init__(self, keys):
        self.linear = nnx.Linear(8, 8, rngs=keys)
        self.norm = nnx.LayerNorm(8, rngs=keys)

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_layers_in_what_is_called_a_norm_are_not_kept_in_float32():
    class Net(nnx.Module):
        def __init__(self):
            self.block = LinearLayerNorm(rngs())

        def __call__(self, x):
            return self.block(x)

    model = apply_policy(Net(), HALF)
    jaxpr = jax.make_jaxpr(lambda model: model(X))(model)
    assert {m.output for m in matmuls(jaxpr)} == {BF16}
