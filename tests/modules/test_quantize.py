"""`apply_policy` and `describe` with a policy that quantises matmuls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.linen import fp8_ops

import jaxmp
from jaxmp.errors import NoBlocksWarning, NothingQuantizedWarning
from jaxmp.policy import first_and_last_in_half

KEY = jax.random.key(0)
TOKENS = jax.random.randint(KEY, (2, 16), 0, 48)
HEAD = "half: the head (no other matmul reads its result)"


class Block(nn.Module):
    """Attention, two dense layers, and a matmul of the user's own."""

    @nn.compact
    def __call__(self, x):
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(normed)
        x = x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x)))
        return x + x @ self.param("own", nn.initializers.lecun_normal(), (32, 32))


class Model(nn.Module):
    """Three blocks, one of them computed again."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(48, 32, name="embed")(tokens)
        for i in range(3):
            x = (nn.remat(Block) if i == 1 else Block)(name=f"block_{i}")(x)
        return nn.Dense(48, name="head")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)
        self.own = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (32, 32)))

    def __call__(self, x):
        x = x + self.attention(x)
        x = x + self.down(nnx.gelu(self.up(x)))
        return x + x @ self.own[...]


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(48, 32, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.head = nnx.Linear(32, 48, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def calls():
    """A call under a policy, for each kind of module."""
    linen, nnx_model = Model(), NnxModel(nnx.Rngs(0))
    variables = linen.init(KEY, TOKENS)
    return {
        "linen": lambda *a, **k: jaxmp.apply_policy(linen, *a, **k).bind(variables),
        "nnx": lambda *a, **k: jaxmp.apply_policy(nnx_model, *a, **k),
    }


CALLS = calls()
IN_A_BLOCK = 7


def count(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("scaled_dot[")


@pytest.mark.parametrize("own_code", ["autocast", "half"])
@pytest.mark.parametrize("policied", CALLS.values(), ids=CALLS)
def test_all_matmuls_with_a_weight_but_the_head(policied, own_code):
    for policy in ("mixed_int8", "mixed_fp8,reduce=float32"):
        model = policied(policy, own_code=own_code)
        assert count(lambda t, m=model: m(t), TOKENS) == 3 * IN_A_BLOCK
    assert count(lambda t: policied("mixed_bfloat16")(t), TOKENS) == 0


@pytest.mark.parametrize("policied", CALLS.values(), ids=CALLS)
def test_rules_by_path(policied):
    def found(*rules, policy="mixed_fp8"):
        model = policied(policy, rules=rules)
        return count(lambda t: model(t), TOKENS)

    all_of_them = 3 * IN_A_BLOCK
    head = jaxmp.PolicyRule(path="head", quantize="fp8")
    assert found(head) == all_of_them + 1
    assert found(head, policy="mixed_bfloat16") == 1
    for decision in ({"quantize": "none"}, {"compute": "bfloat16"}):
        rule = jaxmp.PolicyRule(path="blocks?_1(/.*)?", **decision)
        assert found(rule) == all_of_them - IN_A_BLOCK
    dense = jaxmp.PolicyRule(path=".*/up", compute="float32")
    assert found(dense) == all_of_them - 3
    assert found(*first_and_last_in_half()) == IN_A_BLOCK


@pytest.mark.parametrize("policied", CALLS.values(), ids=CALLS)
def test_gradients_are_near_those_of_float32(policied):
    def gradient(policy):
        model = policied(policy)
        if isinstance(model, nnx.Module):
            graph, params, rest = nnx.split(model, nnx.Param, ...)
            run = lambda p: nnx.merge(graph, p, rest)(TOKENS)  # noqa: E731
        else:
            params = model.variables
            run = lambda p: model.unbind()[0].apply(p, TOKENS)  # noqa: E731
        grads = jax.jit(jax.grad(lambda p: jnp.square(run(p)).mean()))(params)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])

    true = gradient("float32")
    found = gradient("mixed_fp8")
    assert 0 < np.linalg.norm(found - true) < 0.25 * np.linalg.norm(true)


def test_describe_says_how_each_layer_multiplies():
    for module in (Model(), NnxModel(nnx.Rngs(0))):
        described = jaxmp.describe(module, "mixed_fp8", TOKENS)
        by_path = {row.path: row.multiplies for row in described.rows}
        first = "block_0" if "block_0" in by_path else "blocks_0"
        assert by_path["head"] == HEAD
        assert by_path["embed"] == ""
        assert by_path[first] == by_path[f"{first}/up"] == "fp8"
        assert by_path[f"{first}/attention/query"] == "fp8"
        scores = "half: both operands are activations"
        assert by_path[f"{first}/attention"] == scores
        assert described.formats[0].endswith(
            "21 matmuls, in fp8: float8_e4m3fn, a scale per array"
        )
        assert "MULTIPLIES" in str(described)
        assert described.formats[0] in str(described)


def test_describe_of_half_policies_is_as_before():
    described = jaxmp.describe(Model(), "mixed_bfloat16", TOKENS)
    assert described.formats == ()
    assert "MULTIPLIES" not in str(described)


def own_dot(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_matmul_of_the_authors_stays():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(32, dot_general=jax.lax.dot_general)(x))
            x = nn.relu(
                nn.Dense(32, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k))(
                    x
                )
            )
            x = nn.relu(nn.Dense(32, dot_general_cls=fp8_ops.Fp8DotGeneralOp)(x))
            return nn.Dense(32)(x)

    x = jnp.ones((16, 32))
    found = jaxmp.describe(Own(), "mixed_fp8", x)
    multiplies = {row.path: row.multiplies for row in found.rows}
    own = "half: a matmul of the layer's author"
    # The last but one multiplies float8 operands of its own, which are not in half.
    assert [multiplies[f"Dense_{i}"] for i in range(4)] == ["fp8", own, "", HEAD]


@pytest.mark.parametrize("layer", [nn.Dense(32), nnx.Linear(32, 32, rngs=nnx.Rngs(0))])
def test_a_single_layer_is_a_head_and_says_so(layer):
    x = jnp.ones((16, 32))
    model = jaxmp.apply_policy(layer, "mixed_fp8")
    if isinstance(model, nn.Module):
        model = model.bind(model.init(KEY, x))
    with pytest.warns(NothingQuantizedWarning, match="the head.*PolicyRule") as found:
        model(x)
    assert found[0].filename == __file__
    rules = [jaxmp.PolicyRule(path=".*", quantize="fp8")]
    model = jaxmp.apply_policy(layer, "mixed_fp8", rules=rules)
    if isinstance(model, nn.Module):
        model = model.bind(model.init(KEY, x))
    assert count(lambda x: model(x), x) == 1


def test_a_model_without_blocks_is_said():
    layer = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)))
    with pytest.warns(NoBlocksWarning, match="finds no numbered blocks"):
        jaxmp.apply_policy(layer, "mixed_fp8", rules=first_and_last_in_half())
