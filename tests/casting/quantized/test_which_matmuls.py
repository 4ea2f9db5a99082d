"""Which matmuls are multiplied in float8 or int8, and what is said of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxmp
from jaxmp.casting import OpRule

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 64))
W = jax.random.normal(KEY, (4, 64, 64)) / 8
HEAD = "the head (no other matmul reads its result)"
ACTIVATIONS = "both operands are activations"


def mlp(w, x):
    return jnp.square(jnp.tanh(x @ w[0]) @ w[1]).mean()


def deep(w, x):
    return jnp.square(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[2]).mean()


def layer(h, w):
    return h + jnp.tanh(h @ w), None


def scanned(w, x):
    return jnp.square(lax.scan(layer, x, w)[0]).mean()


def scanned_again(w, x):
    return jnp.square(lax.scan(jax.checkpoint(layer), x, w)[0]).mean()


def repeated(w, x):
    step = lax.scan(lambda h, _: layer(h, w[0]), x, None, length=3)
    return jnp.square(step[0]).mean()


def conditional(w, x):
    def yes(x):
        return jnp.tanh(x @ w[0]) @ w[1]

    def no(x):
        return jnp.sin(x @ w[2]) @ w[3]

    return jnp.square(lax.cond(x.sum() > 0, yes, no, x)).mean()


def per_example(w, x):
    """As Equinox writes layers: the weight on the left, one example at a time."""
    outs = jax.vmap(lambda x: w[1] @ jnp.tanh(w[0] @ x))(x)
    return jnp.square(outs).mean()


def einsums(w, x):
    first, second = w[0].reshape(64, 4, 16), w[1].reshape(4, 16, 64)
    heads = jnp.tanh(jnp.einsum("bsm,mhd->bshd", x.reshape(2, 16, 64), first))
    return jnp.square(jnp.einsum("bshd,hdm->bsm", heads, second)).mean()


def attention(w, x):
    q, k, v = (x @ w[i] for i in range(3))
    scores = jax.nn.softmax(q @ k.T / 8)
    return jnp.square(scores @ v @ w[3]).mean()


def weight_norm(w, x):
    unit = w[0] / jnp.linalg.norm(w[0], axis=0, keepdims=True)
    return jnp.square(jnp.tanh(x @ unit) @ w[1]).mean()


def on_devices(w, x):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def loss(w, x):
        return lax.pmean(deep(w, x), "data")

    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(
        w, x
    )


FUNCTIONS = {
    "mlp": (mlp, 1),
    "deep": (deep, 2),
    "scan": (scanned, 1),
    "scan with checkpoint": (scanned_again, 1),
    "one weight in a scan": (repeated, 1),
    "cond": (conditional, 2),
    "vmap": (per_example, 1),
    "einsum": (einsums, 1),
    "attention": (attention, 3),
    "weight norm": (weight_norm, 1),
    "jit": (jax.jit(deep), 2),
    "shard_map": (on_devices, 2),
}


def count(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("scaled_dot[")


@pytest.mark.devices(2)
@pytest.mark.parametrize(("fn", "matmuls"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_those_with_a_weight_but_the_head(fn, matmuls):
    assert count(jaxmp.autocast(fn, "mixed_fp8"), W, X) == matmuls
    assert count(jaxmp.autocast(fn, "mixed_bfloat16"), W, X) == 0


@pytest.mark.devices(2)
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *((name, "mixed_fp8") for name in FUNCTIONS),
        *((name, "mixed_int8:wgrad_half") for name in ("deep", "scan", "vmap")),
    ],
)
def test_a_backward_pass_inside_is_quantised_like_one_outside(name, policy):
    fn, matmuls = FUNCTIONS[name]
    outside = jax.grad(jaxmp.autocast(fn, policy))
    inside = jaxmp.autocast(jax.grad(fn), policy)
    assert count(inside, W, X) == count(outside, W, X) >= matmuls
    if name not in ("scan", "einsum", "attention", "shard_map"):
        return
    true = jnp.ravel(jax.grad(fn)(W, X))
    for gradient in (inside(W, X), outside(W, X)):
        found = jnp.ravel(gradient)
        cosine = found @ true / jnp.linalg.norm(found) / jnp.linalg.norm(true)
        assert cosine > 0.99


def reasons(fn, *args, policy="mixed_fp8", rules=()):
    found = jaxmp.explain(fn, policy, rules=rules)(*args).quantized
    return [matmul.recipe or matmul.reason for matmul in found]


def test_every_matmul_has_its_recipe_or_its_reason():
    assert reasons(attention, W, X) == ["fp8"] * 3 + [ACTIVATIONS] * 2 + [HEAD]
    assert reasons(mlp, W, X[:30]) == ["M=30 is no multiple of 16", HEAD]


@pytest.mark.parametrize(
    ("width", "said"), [(16, "fp8"), (8, "N=8"), (50, "N=50"), (48, "fp8")]
)
def test_sizes_are_multiples_of_16(width, said):
    w = jnp.ones((64, width)), jnp.ones((width, 16)), jnp.ones((16, 16))
    (first, *_) = reasons(deep, w, X)
    assert first.startswith(said)


def test_a_table_that_is_looked_up_too():
    def tied(table, tokens):
        x = jnp.tanh(table[tokens] @ W[0])
        return x @ table.T, x

    assert reasons(tied, jnp.ones((96, 64)), jnp.arange(32)) == [
        "fp8",
        "a table that is looked up too",
    ]


def test_rows_that_a_one_hot_matrix_chooses():
    def tied(table, tokens):
        x = jax.nn.one_hot(tokens, 96) @ table
        return jnp.tanh(x @ W[0]) @ table.T

    table = "a table that is looked up too"
    assert reasons(tied, jnp.ones((96, 64)), jnp.arange(32)) == [table, "fp8", table]


def test_a_product_of_the_input_with_itself():
    assert reasons(lambda x: jnp.tanh(x @ x.T) @ W[0, :32], X)[0] == (
        "both operands are made of the same input"
    )


def test_a_head_that_chooses_the_next_token_is_a_head():
    def generate(w, token):
        table, out = w[0], w[1]

        def step(token, _):
            logits = jnp.tanh(table[token] @ w[2]) @ out
            return jnp.argmax(logits, -1), None

        return lax.scan(step, token, None, length=4)[0]

    assert reasons(generate, W, jnp.arange(16)) == ["fp8", HEAD]


def test_what_has_a_derivative_rule_of_its_own_is_its_authors():
    @jax.custom_vjp
    def linear(w, x):
        return x @ w

    linear.defvjp(
        lambda w, x: (linear(w, x), (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T)
    )

    def fn(w, x):
        return jnp.square(jnp.tanh(linear(w[0], x)) @ w[1] @ w[2]).mean()

    own = "in a function with a derivative rule of its own"
    assert reasons(fn, W, X) == [own, "fp8", HEAD]
    assert count(jax.grad(jaxmp.autocast(fn, "mixed_fp8")), W, X) == 3


def test_batches_convolutions_and_ragged_matmuls_say_what_they_are():
    def fn(w, x):
        batches = jnp.einsum("bsm,bmd->bsd", x.reshape(2, 16, 64), w[:2])
        image = lax.conv(
            x.reshape(2, 16, 8, 8), w[0].reshape(16, 16, 4, 4), (1, 1), "SAME"
        )
        rows = lax.ragged_dot(x, w[:2], jnp.array([16, 16]))
        return jnp.tanh(batches).sum() + image.sum() + rows.sum()

    assert set(reasons(fn, W, X)) == {
        "a batch of 2 matmuls",
        "a convolution",
        "a ragged matmul",
    }


@pytest.mark.parametrize("decide", ["full_precision", "precision", "float32 rule"])
def test_what_is_float32_stays_float32(decide):
    rules = ()
    product = jnp.matmul
    if decide == "full_precision":
        product = jaxmp.full_precision(jnp.matmul)
    elif decide == "precision":
        product = lambda x, w: jnp.matmul(x, w, precision="highest")  # noqa: E731
    else:
        rules = [OpRule(function="first", compute="float32")]

    def first(w, x):
        return product(x, w)

    def fn(w, x):
        return jnp.tanh(first(w[0], x)) @ w[1] @ w[2]

    assert reasons(fn, W, X, rules=rules) == ["fp8", HEAD]


def test_an_autocast_inside_decides_for_itself():
    inner = jaxmp.autocast(deep, "mixed_bfloat16")
    assert count(jaxmp.autocast(inner, "mixed_fp8"), W, X) == 0
    inner = jaxmp.autocast(deep, "mixed_fp8")
    assert count(jaxmp.autocast(inner, "mixed_bfloat16"), W, X) == 2
