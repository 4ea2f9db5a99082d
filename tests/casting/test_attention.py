"""Fused attention: kernels that float32 code calls are traced on half operands."""

import functools
import importlib
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.extend import core as jex_core
from jax.interpreters import ad

import jaxmp
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting import OpRule
from jaxmp.casting.ops import _half_functions
from jaxmp.errors import AutocastRuleError

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
POLICIES = ("mixed_bfloat16", "mixed_float16")
CUDNN, CUDNN_BACKWARD = (
    "dot_product_attention_fwd_wrapper",
    "dot_product_attention_bwd_wrapper",
)
KERNELS = (CUDNN, CUDNN_BACKWARD, "pallas_call")

BATCH, LENGTH, HEADS, DEPTH = 2, 128, 2, 64
WIDTH = HEADS * DEPTH
X = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
W = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)) / 8
# Masks that are added; the bias of cuDNN is float32 in most programs.
BIAS = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), 0.0, np.finfo("f4").min)
BIAS = BIAS[None, None]


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """JAX asks for the version of cuDNN while it traces, and there is none here."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)


def heads(x):
    return x.reshape(BATCH, LENGTH, HEADS, DEPTH)


cudnn_attention = functools.partial(
    jax.nn.dot_product_attention, implementation="cudnn"
)


def cudnn_layer(w, x, **kwargs):
    q, k, v = (heads(x @ (scale * w)) for scale in (1, 2, 3))
    return cudnn_attention(q, k, v, **kwargs).reshape(x.shape) @ w


def flash_layer(w, x):
    q, k, v = (jnp.swapaxes(heads(x @ (s * w)), 1, 2) for s in (1, 2, 3))
    o = flash.flash_attention(q, k, v, causal=True, sm_scale=DEPTH**-0.5)
    return jnp.swapaxes(o, 1, 2).reshape(x.shape) @ w


def splash_kernel(interpret=False):
    masks = splash.MultiHeadMask([splash.CausalMask((LENGTH, LENGTH))] * HEADS)
    return splash.make_splash_mha_single_device(masks, interpret=interpret)


def splash_layer(w, x, kernel=None):
    kernel = splash_kernel() if kernel is None else kernel
    q, k, v = (jnp.swapaxes(heads(x @ (s * w)), 1, 2) for s in (1, 2, 3))
    o = jax.vmap(kernel)(q * DEPTH**-0.5, k, v)
    return jnp.swapaxes(o, 1, 2).reshape(x.shape) @ w


def reference_layer(w, x):
    """What the causal layers above compute, written out."""
    q, k, v = (heads(x @ (s * w)) for s in (1, 2, 3))
    o = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return o.reshape(x.shape) @ w


LAYERS = {
    "cudnn": cudnn_layer,
    "cudnn with a bias": functools.partial(cudnn_layer, bias=BIAS),
    "flash": flash_layer,
    "splash": splash_layer,
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def equations(jaxpr, names=KERNELS):
    """The equations of a jaxpr and of all inside, by the names of their primitives."""
    for eqn in open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name in names:
            yield eqn
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(open_jaxpr(inner), "eqns"):
                    yield from equations(inner, names)


def operands(eqn):
    """The dtypes of what has the shape of a query: operands, gradients, the result."""
    values = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    return {a.dtype for a in values if a.ndim == 4 and a.shape[-1] == DEPTH}


def kernels(fn, *args):
    """For each kernel that a function calls: its name, and the dtypes of operands."""
    found = equations(jax.make_jaxpr(fn)(*args))
    return [(eqn.primitive.name, operands(eqn)) for eqn in found]


def total(fn):
    return lambda *args: fn(*args).sum()


# What the kernels get


CASES = [
    pytest.param(layer, policy, id=f"{name}, {policy}")
    for name, layer in LAYERS.items()
    for policy in POLICIES
    # TPUs take no float16 in a kernel.
    if "cudnn" in name or policy == "mixed_bfloat16"
]


@pytest.mark.parametrize(("layer", "policy"), CASES)
def test_a_kernel_gets_half_operands_forward_and_backward(layer, policy):
    half = jaxmp.get_policy(policy).compute_dtype
    cast = jaxmp.autocast(layer, policy)
    assert jax.eval_shape(cast, W, X).dtype == F32
    assert [dtypes for _, dtypes in kernels(cast, W, X)] == [{half}]
    for fn in (jax.grad(total(cast)), jaxmp.autocast(jax.grad(total(layer)), policy)):
        assert jax.eval_shape(fn, W, X).dtype == F32
        found = kernels(fn, W, X)
        assert len(found) >= 2
        assert all(dtypes == {half} for _, dtypes in found)


@layers
def test_the_neighbours_of_a_kernel_stay_in_half(layer):
    for fn in (layer, jax.grad(total(layer))):
        told = jaxmp.explain(fn)(W, X)
        # Splash multiplies in float32 to find the sum of each row's gradient.
        assert told.half_flops > 0.999
        assert all("traced on half" in reason.reason for reason in told.reasons)
        assert any("traced on half operands" in row.reason for row in told.rows)
        written = [row.source for row in told.rows if "traced on half" in row.reason]
        files = ("test_attention.py", "splash_attention_kernel.py")
        assert all(source.startswith(files) for source in written)


@layers
def test_what_is_kept_for_the_backward_pass_is_half(layer):
    kept = jaxmp.explain(layer)(W, X).residual_bytes
    # The logarithm of each row's sum is float32, and so are the weights.
    rows = 128 * BATCH * HEADS * LENGTH * 4
    assert kept["float32"] <= W.nbytes + 2 * rows + BIAS.nbytes
    assert kept["bfloat16"] <= 5 * X.nbytes + BIAS.nbytes // 2


def test_explain_tells_about_what_cannot_be_differentiated():
    """The derivative of some Pallas kernels is an assertion of JAX's that fails."""
    kernel_p = jex_core.Primitive("test_kernel_without_a_derivative")
    kernel_p.def_abstract_eval(lambda x: x)

    def derivative(primals, tangents):
        raise AssertionError

    ad.primitive_jvps[kernel_p] = derivative
    told = jaxmp.explain(lambda w, x: kernel_p.bind(x @ w))(W, X)
    assert told.half_flops == 1
    assert told.residual_bytes == {}


def test_without_autocast_a_kernel_gets_what_it_is_called_with():
    assert kernels(flash_layer, W, X) == [("pallas_call", {F32})]
    assert kernels(jaxmp.autocast(flash_layer, "float32"), W, X) == [
        ("pallas_call", {F32})
    ]


def test_half_operands_are_left_alone():
    def written_in_float16(w, x):
        return flash_layer(w.astype(F16), x.astype(F16))

    cast = jaxmp.autocast(written_in_float16)
    assert kernels(cast, W, X) == [("pallas_call", {F16})]
    told = jaxmp.explain(written_in_float16)(W, X)
    assert not any("traced on half operands" in row.reason for row in told.rows)


def test_masks_and_lengths_stay_as_they_are():
    lengths = jnp.full(BATCH, LENGTH, jnp.int32)
    mask = jnp.ones((1, 1, LENGTH, LENGTH), bool)

    def padded(w, x):
        return cudnn_layer(
            w, x, mask=mask, query_seq_lengths=lengths, key_value_seq_lengths=lengths
        )

    (eqn,) = equations(jax.make_jaxpr(jaxmp.autocast(padded))(W, X))
    assert operands(eqn) == {BF16}
    assert [v.aval.dtype for v in eqn.invars if v.aval.shape == (BATCH,)] == [
        jnp.int32
    ] * 2


def test_a_mask_that_is_added_stays_finite_in_half():
    biases = []

    def attend(q, bias):
        jax.debug.callback(lambda b: biases.append(np.asarray(b)), bias)
        return q

    narrowed = _on_half(attend, ("q", "bias"))
    for policy in POLICIES:
        jaxmp.autocast(narrowed, policy)(X[0], BIAS[0, 0])
        jax.effects_barrier()
        assert biases[-1].dtype == jaxmp.get_policy(policy).compute_dtype
        assert np.isfinite(biases[-1].astype("f4")).all()


def _on_half(fn, operands):
    from jaxmp.casting.kernels.half_operands import on_half

    return on_half(fn, operands)


def test_the_residual_that_is_asked_for_is_shown_in_float32():
    def with_residual(w, x):
        out, residual = cudnn_attention(*[heads(x @ w)] * 3, return_residual=True)
        return out, residual

    out = jax.eval_shape(jaxmp.autocast(with_residual), W, X)
    assert [x.dtype for x in out] == [F32, F32]


# Transformations


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (x + cudnn_layer(w, x), None), x, w[None])[0]


def mapped(w, x):
    fn = jax.vmap(lambda x: cudnn_attention(x, x, x))
    return fn(heads(x @ w)[None])[0].reshape(x.shape) @ w


@jax.custom_vjp
def with_a_rule(w, x):
    return cudnn_layer(w, x)


def _forward(w, x):
    return jax.vjp(cudnn_layer, w, x)


with_a_rule.defvjp(_forward, lambda vjp, g: vjp(g))


def switched(w, x):
    return jax.lax.cond(x.sum() > 0, cudnn_layer, lambda w, x: x @ w, w, x)


@pytest.mark.parametrize(
    "fn",
    [
        jax.jit(cudnn_layer),
        jax.checkpoint(cudnn_layer),
        jax.checkpoint(jax.jit(cudnn_layer)),
        scanned,
        mapped,
        with_a_rule,
        switched,
    ],
    ids=["jit", "checkpoint", "both", "scan", "vmap", "custom_vjp", "cond"],
)
def test_under_transformations_of_jax(fn):
    cast = jaxmp.autocast(fn)
    for traced in (cast, jax.grad(total(cast)), jaxmp.autocast(jax.grad(total(fn)))):
        found = kernels(jax.jit(traced), W, X)
        assert found
        assert all(dtypes == {BF16} for _, dtypes in found)
        assert jax.eval_shape(traced, W, X).dtype == F32
    assert jaxmp.explain(jax.grad(total(fn)))(W, X).half_flops == 1


def test_what_jit_traced_under_autocast_is_not_used_without_it():
    @jax.jit
    def layer(w, x):
        return flash_layer(w, x)

    cast = jaxmp.autocast(layer)
    for _ in range(2):
        assert kernels(cast, W, X) == [("pallas_call", {BF16})]
        assert kernels(layer, W, X) == [("pallas_call", {F32})]


@pytest.mark.parametrize("layer", [flash_layer, splash_layer])
def test_a_kernel_for_tpus_stays_in_float32_under_a_float16_policy(layer):
    cast = jaxmp.autocast(layer, "mixed_float16")
    for fn in (cast, jax.grad(total(cast))):
        assert all(dtypes == {F32} for _, dtypes in kernels(fn, W, X))


def test_numbers_are_those_of_float32_up_to_rounding():
    fn, reference = total(flash_layer), total(reference_layer)
    grad = functools.partial(jax.value_and_grad, argnums=(0, 1))
    expected = grad(reference)(W, X)
    with pltpu.force_tpu_interpret_mode():
        found = {"flash": jax.jit(grad(jaxmp.autocast(fn)))(W, X)}
    splash_fn = functools.partial(splash_layer, kernel=splash_kernel(interpret=True))
    found["splash"] = jax.jit(grad(jaxmp.autocast(total(splash_fn))))(W, X)
    for name, tree in found.items():
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            assert x.dtype == F32
            error = jnp.linalg.norm(x - y) / jnp.linalg.norm(y)
            assert error < 0.02, name


# Layers of Flax


def linen_model(attention_fn):
    return nn.MultiHeadDotProductAttention(
        HEADS, qkv_features=WIDTH, attention_fn=attention_fn
    )


def linen_attention(query, key, value, **kwargs):
    """Flax passes more than JAX's function takes."""
    return cudnn_attention(query, key, value)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (heads(nn.Dense(WIDTH)(x)) for _ in range(3))
        x = x + cudnn_attention(q, k, v).reshape(x.shape)
        return x + nn.Dense(WIDTH)(nn.LayerNorm()(x))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        q, k, v = map(heads, jnp.split(self.qkv(x), 3, -1))
        return self.out(x + cudnn_attention(q, k, v).reshape(x.shape))


def nnx_attention():
    return nnx.MultiHeadAttention(
        HEADS, WIDTH, decode=False, attention_fn=linen_attention, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize(
    "model", [linen_model(linen_attention), Block(), nn.remat(Block)()]
)
def test_models_of_linen(model):
    initial = (
        model.copy(attention_fn=nn.dot_product_attention)
        if hasattr(model, "attention_fn")
        else model
    )
    with jax.numpy_rank_promotion("allow"):
        shapes = jax.eval_shape(jaxmp.autocast(initial.init), jax.random.key(0), X)
        params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
        cast = jaxmp.autocast(model.apply)
        applied = jaxmp.apply_policy(model, "mixed_bfloat16").apply
        for fn in (cast, applied):
            assert all(d == {BF16} for _, d in kernels(fn, params, X))
            grad = jax.grad(lambda p, x, fn=fn: fn(p, x).astype(F32).sum())
            found = kernels(grad, params, X)
            assert {name for name, _ in found} == {CUDNN, CUDNN_BACKWARD}
            assert all(d == {BF16} for _, d in found)
        assert jaxmp.explain(model.apply)(params, X).half_flops == 1


@pytest.mark.parametrize("make", [nnx_attention, lambda: NNXBlock(nnx.Rngs(0))])
def test_models_of_nnx(make):
    with jax.numpy_rank_promotion("allow"):
        model = make()
        fn = jaxmp.autocast(lambda model, x: model(x))
        assert [d for _, d in kernels(fn, model, X)] == [{BF16}]
        applied = jaxmp.apply_policy(model, "mixed_bfloat16")
        assert [d for _, d in kernels(lambda x: applied(x), X)] == [{BF16}]
        graphdef, state = nnx.split(applied)

        def loss(state, x):
            return nnx.merge(graphdef, state)(x).astype(F32).sum()

        found = kernels(jax.grad(loss), state, X)
        assert {name for name, _ in found} == {CUDNN, CUDNN_BACKWARD}
        assert all(d == {BF16} for _, d in found)


def test_a_layer_that_a_policy_keeps_in_float32_is_not_narrowed():
    with jax.numpy_rank_promotion("allow"):
        rules = [jaxmp.PolicyRule(path="attend", compute="float32")]
        applied = jaxmp.apply_policy(Outer(), "mixed_bfloat16", rules=rules)
        params = jax.eval_shape(applied.init, jax.random.key(0), X)
        params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), params)
        assert [d for _, d in kernels(applied.apply, params, X)] == [{F32}]
        half = jaxmp.apply_policy(Outer(), "mixed_bfloat16")
        assert [d for _, d in kernels(half.apply, params, X)] == [{BF16}]


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (WIDTH, WIDTH))
        return flash_layer(w, x)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(Attend(name="attend")(nn.Dense(WIDTH)(x)))


# What keeps a call in float32


def test_full_precision_and_an_inner_autocast_keep_a_call_in_float32():
    kept = [
        jaxmp.full_precision(flash_layer),
        jaxmp.full_precision(jax.jit(flash_layer)),
        jaxmp.full_precision(jax.checkpoint(flash_layer)),
        jaxmp.autocast(jax.jit(flash_layer), "float32"),
    ]
    for layer in kept:
        cast = jaxmp.autocast(lambda w, x, layer=layer: layer(w, x) @ w)
        assert kernels(cast, W, X) == [("pallas_call", {F32})]
        assert all(d == {F32} for _, d in kernels(jax.grad(total(cast)), W, X))
    inner = jaxmp.autocast(jaxmp.autocast(cudnn_layer, "mixed_float16"))
    assert kernels(inner, W, X) == [(CUDNN, {F16})]


def named(w, x):
    with jax.named_scope("first"):
        x = flash_layer(w, x)
    with jax.named_scope("second"):
        return attending(w, x)


def attending(w, x):
    """Takes float16 too, in a trace."""
    q = jnp.swapaxes(heads(x @ w), 1, 2)
    kernel = jaxmp.half_operands(flash.flash_attention.__wrapped__)
    return kernel(q, q, q).reshape(x.shape) @ w


def test_rules_by_path_and_function_decide():
    def operands_under(*rules):
        return [d for _, d in kernels(jaxmp.autocast(named, rules=rules), W, X)]

    assert operands_under() == [{BF16}, {BF16}]
    assert operands_under(OpRule(path="first", compute=F32)) == [{F32}, {BF16}]
    assert operands_under(OpRule(path="second", compute=F16)) == [{BF16}, {F16}]
    assert operands_under(OpRule(function="attending", compute=F32)) == [{BF16}, {F32}]
    both = OpRule(path="second", compute=BF16), OpRule(path=".*", compute=F32)
    assert operands_under(*both) == [{F32}, {BF16}]
    matmuls = OpRule(primitive="dot_general", compute=F32)
    assert operands_under(matmuls) == [{BF16}, {BF16}]


def test_rules_without_a_half_policy_narrow_where_they_match():
    rules = [OpRule(path="second", compute=BF16)]
    cast = jaxmp.autocast(named, "float32", rules=rules)
    assert [d for _, d in kernels(cast, W, X)] == [{F32}, {BF16}]


def test_a_rule_that_a_loop_hides_is_an_error_that_says_what_to_write():
    def looped(w, x):
        with jax.named_scope("first"):
            body = jax.checkpoint(flash_layer)
            return body(w, x)

    rules = [OpRule(path="first", compute=F32)]
    with pytest.raises(AutocastRuleError, match="full_precision") as caught:
        jaxmp.autocast(looped, rules=rules)(W, X)
    assert "test_attention.py" in str(caught.value)
    assert "path='first'" in str(caught.value)


@pytest.mark.parametrize(
    "fn",
    [
        jaxmp.full_precision(cudnn_layer),
        jaxmp.autocast(jaxmp.full_precision(cudnn_layer)),
        jaxmp.autocast(cudnn_layer, "float32"),
        jaxmp.autocast(cudnn_layer, rules=[OpRule(function=".*layer", compute=F32)]),
    ],
)
def test_cudnn_in_float32_is_an_error_that_says_what_to_write(fn):
    with pytest.raises(NotImplementedError, match="Q must be fp16") as caught:
        fn(W, X)
    (note,) = [text for text in caught.value.__notes__ if text.startswith("jaxmp: ")]
    for repair in ("mixed_bfloat16", "full_precision", "implementation='xla'"):
        assert repair in note


# What is known from the start


@pytest.mark.parametrize("function", _half_functions._KNOWN, ids=lambda f: f.name)
def test_known_functions_are_where_they_are_said_to_be(function):
    module = function.name.removesuffix(".__call__").rpartition(".")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module(module)
    place = _half_functions.find(function)
    assert callable(place.value)
    assert vars(place.owner)[place.name] is place.value


def test_dot_product_attention_without_cudnn_is_planned_as_ever():
    for implementation in ("xla", None):

        def layer(w, x, implementation=implementation):
            q = heads(x @ w)
            return jax.nn.dot_product_attention(q, q, q, implementation=implementation)

        told = jaxmp.explain(layer)(W, X)
        assert told.half_flops == 1
        assert not any("traced on half operands" in row.reason for row in told.rows)
