"""The catalogue of planted faults: functions that make a NaN or an infinity.

Each case is a function that returns `(fn, args, options)`, whose source marks the line
of the fault by a comment. The decorator says what `find_nonfinite` has to answer.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

F16, F32 = jnp.float16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Fault:
    """A planted fault, and what has to be found.

    Attributes:
      make: returns `(fn, args, options)`.
      primitive: the operation to blame.
      cause: words of its cause.
      repair: words of its repair.
      kind: of the report.
      is_backward: whether only gradients show it.
      iterations: of the loops around.
      path: what the module path ends in.
      devices: that it takes.
    """

    make: Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]
    primitive: str
    cause: str
    repair: str = ""
    kind: str = "divergence"
    is_backward: bool = False
    iterations: tuple[int, ...] = ()
    path: str = ""
    devices: int = 1

    def __str__(self) -> str:
        return self.make.__name__

    @property
    def line(self) -> int | None:
        """The line that the comment marks."""
        lines, start = inspect.getsourcelines(self.make)
        marked = [
            i for i, line in enumerate(lines) if line.rstrip().endswith("# FAULT")
        ]
        return start + marked[0] if marked else None


FAULTS: list[Fault] = []


def fault(primitive, cause, repair="", **expected):
    def add(make):
        FAULTS.append(Fault(make, primitive, cause, repair, **expected))
        return make

    return add


def ones(*shape, dtype=F32):
    return jnp.ones(shape, dtype)


def variables(network, *args):
    """The variables of a linen module, all 0.5: initialisers take long to compile."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)


# Forward, plain functions


@fault("exp", "exp of 93 overflows float32", "Subtract the maximum", path="layer_6")
def exp_in_layer_7_of_12():
    def loss(w, x):
        for i in range(12):
            with jax.named_scope(f"layer_{i}"):
                x = jnp.tanh(x * w[i])
                gate = jnp.exp(w[i] * x / x)  # FAULT
                x = x * gate / (1 + gate)
        return x.sum()

    return loss, (jnp.ones(12).at[6].set(93), jnp.full(3, 0.5)), {}


@fault("exp", "exp of 12 overflows float16, whose largest is 65504", "jax.nn.softmax")
def softmax_by_hand():
    def loss(w):
        e = jnp.exp(w)  # FAULT
        return (e / e.sum() * jnp.arange(3, dtype=F16)).sum()

    return loss, (jnp.array([1, 5, 12], F16),), {}


@fault("exp", "exp of 1000 overflows float32", "jax.nn.logsumexp")
def logsumexp_by_hand():
    def loss(w):
        total = jnp.sum(jnp.exp(w))  # FAULT
        return jnp.log(total)

    return loss, (jnp.array([1.0, 1000.0]),), {}


@fault("log", "log of 0: a probability", "jax.nn.log_softmax")
def log_of_underflowed_probability():
    def loss(w):
        p = jax.nn.softmax(w)
        return -jnp.log(p[0])  # FAULT

    return loss, (jnp.array([-20, 0, 1], F16),), {}


@fault("log", "log of -1, which is negative", "Find out why")
def log_of_negative():
    def loss(w):
        return jnp.log(w - 2).sum()  # FAULT

    return loss, (jnp.array([3.0, 1.0]),), {}


@fault("log1p", "log1p of -1")
def log1p_at_minus_one():
    def loss(w):
        return jnp.log1p(-w).sum()  # FAULT

    return loss, (jnp.array([0.5, 1.0]),), {}


@fault("div", "0 / 0: a norm", "Add an eps")
def norm_of_zeros():
    def loss(w, x):
        y = w[None] * x
        size = jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True))
        return (y / size).sum()  # FAULT

    return loss, (ones(3), jnp.zeros((2, 3)).at[0].set(1.0)), {"backward": False}


@fault("div", "an eps below 5.96e-08 is 0 in float16", "eps that the dtype can hold")
def eps_lost_in_float16():
    def loss(w, x):
        y = w * x
        return (y / (jnp.abs(y).max() + 1e-8)).sum()  # FAULT

    return loss, (ones(3, dtype=F16), jnp.zeros(3, F16)), {"backward": False}


@fault("div", "a tiny denominator", "jnp.maximum(x, eps)")
def division_by_tiny_deviation():
    def loss(w, x):
        deviation = jnp.std(x * 1e-15)
        return (w / deviation).sum()  # FAULT

    return loss, (jnp.full(3, 1e25), jnp.arange(3.0)), {"backward": False}


@fault("div", "1 / 0")
def odds_of_certainty():
    def loss(w):
        p = jax.nn.sigmoid(w)
        return jnp.log1p(p / (1 - p)).sum()  # FAULT

    return loss, (jnp.array([1.0, 40.0]),), {}


@fault("rsqrt", "rsqrt of 0: a norm or a variance of zeros", "eps inside the root")
def normalised_constant_feature():
    def loss(w, x):
        y = w * (x - x.mean())
        scale = lax.rsqrt(jnp.mean(y * y))  # FAULT
        return (y * scale).sum()

    return loss, (jnp.float32(1), ones(4)), {"backward": False}


@fault("sqrt", "which is negative: a variance computed as", "jnp.var")
def variance_by_cancellation():
    def loss(w, x):
        variance = jnp.mean(x * x) - jnp.mean(x) ** 2
        return w / jnp.sqrt(variance)  # FAULT

    return loss, (jnp.float32(1), jnp.full(6, 12345.6)), {}


@fault("mul", "0 * inf, out of an infinite constant", "jnp.where(mask, scores")
def mask_multiplied_in_float16():
    def loss(w, mask):
        bias = (1 - mask) * -1e9  # FAULT
        return jax.nn.softmax(w + bias).max()

    return loss, (jnp.arange(3, dtype=F16), jnp.array([1, 1, 0], F16)), {}


@fault("add", "a mask constant added", "jnp.where(mask, scores")
def mask_added_twice():
    def loss(w, causal, padding):
        low = jnp.finfo(F16).min
        scores = w + jnp.where(causal, 0, low) + jnp.where(padding, 0, low)  # FAULT
        return scores.sum()

    mask = jnp.array([True, True, False])
    return loss, (jnp.arange(3, dtype=F16), mask, mask), {}


@fault("sub", "inf - inf, out of an infinite constant", "where=")
def row_masked_throughout():
    def loss(w, mask):
        scores = jnp.where(mask, w, -jnp.inf)
        shifted = scores - scores.max(-1, keepdims=True)  # FAULT
        e = jnp.exp(shifted)
        return (e / e.sum(-1, keepdims=True)).sum()

    return loss, (ones(2, 3), jnp.array([[True, True, False], [False] * 3])), {}


@fault("convert_element_type", "the sum of 4096 values of about 30", "float32")
def sum_in_float16():
    def loss(w):
        return jnp.sum(w)  # FAULT

    return loss, (jnp.full(4096, 30, F16),), {}


@fault("reduce_sum", "the sum of 2048 values of about 60 overflows float16")
def sum_of_lax_in_float16():
    def loss(w):
        return lax.reduce_sum(w, (0,))  # FAULT

    return loss, (jnp.full(2048, 60, F16),), {}


@fault("cumsum", "the sum of 512 values of about 200 overflows float16")
def running_sum():
    def loss(w):
        return lax.cumsum(w)[-1]  # FAULT

    return loss, (jnp.full(512, 200, F16),), {}


@fault("integer_pow", "300 ** 2 overflows float16", "Scale x down")
def square_in_float16():
    def loss(w):
        return jnp.mean(w**2)  # FAULT

    return loss, (jnp.array([1, 300], F16),), {}


@fault("mul", "300 * 300 overflows float16")
def product_in_float16():
    def loss(w, x):
        return (w * x).mean()  # FAULT

    return loss, (jnp.array([1, 300], F16), jnp.array([1, 300], F16)), {}


@fault("dot_general", "a sum of 64 products of about 40 * 40", "head_size**-0.5")
def scores_without_scaling():
    def loss(w, x):
        scores = x @ w.T  # FAULT
        return jax.nn.softmax(scores).max()

    return loss, (jnp.full((4, 64), 40, F16), jnp.full((4, 64), 40, F16)), {}


@fault("convert_element_type", "the cast of 100000 from float32 overflows float16")
def cast_to_float16():
    def loss(w):
        return (w * 1e5).astype(F16).mean()  # FAULT

    return loss, (ones(2),), {}


@fault("acos", "acos of 1.5 is not defined; it takes -1 to 1", "Clip")
def arccos_out_of_range():
    def loss(w):
        return lax.acos(w).sum()  # FAULT

    return loss, (jnp.array([0.5, 1.5]),), {}


@fault("atanh", "atanh of 1 is infinite", "Clip")
def arctanh_at_one():
    def loss(w):
        return jnp.arctanh(w).sum()  # FAULT

    return loss, (jnp.array([0.5, 1.0]),), {}


# Forward, inside of something


@fault("log", "log of 0", iterations=(513,))
def iteration_513_of_a_scan():
    def loss(w, xs):
        def body(h, x):
            h = 0.9 * h + jnp.log(x * w)  # FAULT
            return h, h

        h, hs = lax.scan(body, w, xs)
        return h + hs.mean()

    return loss, (jnp.float32(1), jnp.ones(1000).at[513].set(0)), {}


@fault("exp", "exp of 100 overflows", iterations=(3, 5))
def scan_inside_of_a_scan():
    def loss(w, xs):
        def inner(h, x):
            return h + jnp.exp(x * w), None  # FAULT

        def outer(h, row):
            return lax.scan(inner, h, row)[0] * 0.5, None

        return lax.scan(outer, w, xs)[0]

    return loss, (jnp.float32(1), jnp.ones((6, 8)).at[3, 5].set(100)), {}


@fault("log", "log of 0", iterations=(2,))
def reversed_scan():
    def loss(w, xs):
        def body(h, x):
            return h * jnp.log(x), None  # FAULT

        return lax.scan(body, w, xs, reverse=True)[0]

    return loss, (jnp.float32(1), jnp.full(5, 2.0).at[2].set(0)), {}


@fault("integer_pow", "overflows float32", iterations=(6,))
def iteration_of_a_while_loop():
    def loss(w):
        def body(state):
            i, x = state
            return i + 1, x**2  # FAULT

        return lax.while_loop(lambda state: state[0] < 20, body, (0, w))[1]

    return loss, (jnp.float32(2),), {"backward": False}


@fault("exp", "exp of 200 overflows")
def branch_of_a_cond():
    def loss(w, x):
        def curved(x):
            return jnp.exp(w * x)  # FAULT

        return lax.cond(x[0] > 0, curved, lambda x: w * x, x).sum()

    return loss, (jnp.float32(2), jnp.full(2, 100.0)), {}


@fault("exp", "exp of 200 overflows")
def inside_of_remat():
    def loss(w, x):
        @jax.checkpoint
        def block(x):
            return jnp.exp(w * x)  # FAULT

        return block(x).sum()

    return loss, (jnp.float32(2), jnp.full(2, 100.0)), {}


@fault("exp", "exp of 200 overflows")
def inside_of_jit_and_vmap():
    @jax.jit
    def block(x):
        return jnp.exp(x)  # FAULT

    def loss(w, x):
        return jax.vmap(lambda x: block(w * x))(x).sum()

    return loss, (jnp.float32(2), jnp.full(2, 100.0)), {}


@fault("exp", "exp of 200 overflows")
def custom_vjp_forward():
    @jax.custom_vjp
    def block(x):
        return jnp.exp(x)

    def forward(x):
        y = jnp.exp(x)  # FAULT
        return y, y

    block.defvjp(forward, lambda y, dy: (dy * y,))

    def loss(w):
        return block(w).sum()

    return loss, (jnp.full(2, 200.0),), {}


@fault(
    "psum_invariant",
    "the sum over devices of 20000 overflows float16",
    "jax.lax.psum",
    devices=4,
)
def sum_over_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = PartitionSpec("data")

    def loss(w, x):
        def shard(w, x):
            return lax.psum(w * x, "data")  # FAULT

        summed = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=PartitionSpec(),
        )
        return summed(w, x).astype(F32).sum()

    return loss, (jnp.float16(1), jnp.full(4, 20000, F16)), {}


@fault("sub", "inf - inf, out of an infinite constant", "where=")
def row_masked_throughout_on_a_device():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = PartitionSpec("data")

    def loss(w, mask):
        def shard(w, mask):
            scores = jnp.where(mask, w, -jnp.inf)
            return jnp.exp(scores - scores.max(-1, keepdims=True))  # FAULT

        softmax = jax.shard_map(shard, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        return softmax(w, mask).sum()

    return loss, (ones(2, 3), jnp.array([[True, True, False], [False] * 3])), {}


# Backward only


@fault("div", "the derivative of sqrt at 0", "eps inside", is_backward=True)
def sqrt_at_zero():
    def loss(w):
        return jnp.sqrt(w).sum()  # FAULT

    return loss, (jnp.array([0.0, 1.0]),), {}


@fault("div", "the derivative of sqrt at 0", "no gradient at zeros", is_backward=True)
def norm_at_zero():
    def loss(w):
        return jnp.linalg.norm(w)  # FAULT

    return loss, (jnp.zeros(3),), {}


@fault("div", "the derivative of log at 0", "jnp.where(ok, x, 1.0)", is_backward=True)
def where_behind_log():
    def loss(w):
        return jnp.where(w > 0, jnp.log(w), 0.0).sum()  # FAULT

    return loss, (jnp.array([0.0, 1.0]),), {}


@fault("exp", "0 * inf is NaN", "safe = jnp.where(ok, x, 1.0)", is_backward=True)
def clip_behind_exp():
    def loss(w):
        return jnp.minimum(jnp.exp(w), 10.0).sum()  # FAULT

    return loss, (jnp.array([1.0, 100.0]),), {}


@fault("rsqrt", "the derivative of acos at 1", "clip", is_backward=True)
def arccos_at_one():
    def loss(w):
        return lax.acos(w).sum()  # FAULT

    return loss, (jnp.array([0.5, 1.0]),), {}


@fault("pow", "the derivative of pow at 0", is_backward=True)
def power_of_a_half_at_zero():
    def loss(w):
        return (w**0.5).sum()  # FAULT

    return loss, (jnp.array([0.0, 1.0]),), {}


@fault("div", "the derivative of atan2 at (0, 0)", is_backward=True)
def angle_at_the_origin():
    def loss(w):
        return jnp.arctan2(w[0], w[1])  # FAULT

    return loss, (jnp.zeros(2),), {}


@fault("div", "1 / 0", is_backward=True)
def custom_vjp_backward():
    @jax.custom_vjp
    def block(x):
        return x * 2

    def backward(x, dy):
        return (dy / (x - 1),)  # FAULT

    block.defvjp(lambda x: (block(x), x), backward)

    def loss(w):
        return block(w).sum()

    return loss, (jnp.arange(3.0),), {}


@fault("div", "1 / 0", is_backward=True, iterations=(4,))
def custom_vjp_backward_in_a_scan():
    @jax.custom_vjp
    def block(x, y):
        return x * y

    def backward(saved, dy):
        x, y = saved
        return dy * y, dy * x / y  # FAULT

    block.defvjp(lambda x, y: (block(x, y), (x, y)), backward)

    def loss(w, xs):
        return lax.scan(lambda h, x: (h + block(1.0, x * w), None), 0.0, xs)[0]

    return loss, (jnp.float32(1), jnp.arange(6.0) - 4), {}


@fault("rsqrt", "rsqrt of 0", is_backward=True)
def custom_jvp_rule():
    @jax.custom_jvp
    def block(x):
        return x * 2

    @block.defjvp
    def rule(primals, tangents):
        (x,), (dx,) = primals, tangents
        return block(x), dx * lax.rsqrt(x)  # FAULT

    def loss(w):
        return jax.jit(block)(w).sum()

    return loss, (jnp.arange(3.0),), {}


@fault("div", "the derivative of sqrt at 0", is_backward=True)
def sqrt_inside_of_remat():
    def loss(w):
        @jax.checkpoint
        def block(x):
            return jnp.sin(jnp.sqrt(x))  # FAULT

        return block(w).sum()

    return loss, (jnp.array([0.0, 1.0]),), {}


@fault(
    *("convert_element_type", "overflows float16, whose largest is 65504, under the"),
    kind="handled overflow",
    is_backward=True,
)
def loss_scale_too_high():
    def loss(w, x):
        y = x @ w
        return jnp.mean((y * 8).astype(F32))  # FAULT

    return loss, (ones(4, 4, dtype=F16), ones(4, 4, dtype=F16)), {"loss_scale": 2.0**20}


@fault("scatter-add", "an embedding", kind="handled overflow", is_backward=True)
def gradient_of_an_embedding():
    def loss(table, tokens):
        rows = table[tokens]  # FAULT
        return rows.astype(F32).sum()

    args = (ones(4, 2, dtype=F16), jnp.zeros(1000, jnp.int32))
    return loss, args, {"loss_scale": 2.0**8}


# The arguments


@fault(
    "input", "the argument params['w'][1] already holds NaN", "should have been skipped"
)
def parameter_that_is_nan():
    def loss(params, x):
        return (params["w"][0] * x + params["w"][1]).sum()

    return loss, ({"w": [jnp.float32(1), jnp.float32(jnp.nan)]}, ones(3)), {}


@fault("sub", "inf - inf, out of an infinity that the function was given")
def two_infinite_masks():
    def loss(w, mask):
        return (w + mask - mask).sum()  # FAULT

    return loss, (ones(2), jnp.array([0, jnp.inf])), {}


# A step that differentiates by itself


@fault("div", "the derivative of sqrt at 0")
def training_step():
    def step(w, x):
        def loss(w):
            return jnp.sqrt(w * x).sum()  # FAULT

        return w - 0.1 * jax.grad(loss)(w)

    return step, (ones(3), jnp.arange(3.0)), {}


# Flax linen


@fault(
    *("dot_general", "products of about", "PolicyRule(path='block_6/up'"),
    path="block_6/up",
)
def linen_block_7_of_12():
    class Block(nn.Module):
        gain: float = 1.0

        @nn.compact
        def __call__(self, x):
            up = nn.Dense(8, name="up", use_bias=False)
            return up(x * self.gain) / (4 * self.gain)  # FAULT

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(12):
                x = Block(2e4 if i == 6 else 1.0, name=f"block_{i}")(x)
            return x

    network, x = Network(), jnp.ones((2, 8))
    params = variables(network, x)

    def loss(params, x):
        return network.apply(params, x).astype(F32).mean()

    return loss, (params, x), {"policy": "mixed_float16"}


@fault("div", "an eps below 5.96e-08 is 0 in float16", path="norm")
def linen_norm_with_lost_eps():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x / (jnp.abs(x).max(-1, keepdims=True) + 1e-8)  # FAULT

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Norm(name="norm")(nn.Dense(4, use_bias=False, dtype=F16)(x))

    network, x = Network(), jnp.zeros((2, 8))
    params = variables(network, x)

    def loss(params, x):
        return network.apply(params, x).mean()

    return loss, (params, x), {}


@fault("exp", "overflows float32", iterations=(5,))
def linen_layers_in_a_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, gain):
            y = nn.Dense(4)(x)
            return jnp.log1p(jnp.exp(gain * nn.sigmoid(y))), None  # FAULT

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, gains):
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return layers()(x, gains)[0]

    network, x = Network(), jnp.ones((2, 4))
    gains = jnp.ones(6).at[5].set(1e4)
    params = variables(network, x, gains)

    def loss(params, x, gains):
        return network.apply(params, x, gains).mean()

    return loss, (params, x, gains), {}


@fault("log", "log of 0: a probability", path="Head_0")
def linen_head_in_remat():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            p = jax.nn.softmax(nn.Dense(3)(x) * jnp.array([[1e4, 0, 0]]))
            return jnp.log(p)  # FAULT

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Head)()(x)

    network, x = Network(), jnp.ones((2, 4))
    params = variables(network, x)

    def loss(params, x):
        return -network.apply(params, x).mean()

    return loss, (params, x), {}


@fault("div", "the derivative of sqrt at 0", is_backward=True, path="pool")
def linen_norm_pooling():
    class Pool(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sqrt(jnp.sum(x * x, axis=1))  # FAULT

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Pool(name="pool")(nn.Dense(4, use_bias=False)(x))

    network, x = Network(), jnp.zeros((2, 3, 4))
    params = variables(network, x)

    def loss(params, x):
        return network.apply(params, x).mean()

    return loss, (params, x), {}


# Flax nnx


@fault("exp", "overflows float32", path="attention")
def nnx_attention_by_hand():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            scores = 1e3 * jnp.abs(self.query(x) @ x.T)
            weights = jnp.exp(scores)  # FAULT
            return weights / weights.sum(-1, keepdims=True) @ x

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.attention = Attention(rngs)

        def __call__(self, x):
            return self.attention(x)

    def loss(model, x):
        return model(x).mean()

    return loss, (Network(nnx.Rngs(0)), ones(3, 4)), {}


@fault("dot_general", "products of about", path="layers_6/up")
def nnx_layer_7_of_12():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            init = nnx.initializers.ones
            self.up = nnx.Linear(4, 4, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.up(x) / 4  # FAULT

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Layer(rngs) for _ in range(12)])

        def __call__(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x * (3e4 if i == 6 else 1.0))
            return x

    def loss(model, x):
        return model(x).astype(F32).mean()

    return loss, (Network(nnx.Rngs(0)), ones(3, 4)), {"policy": "mixed_float16"}


@fault("input", "the argument model.linear.kernel already holds NaN")
def nnx_parameter_that_is_nan():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    def loss(model, x):
        return model(x).mean()

    model = Network(nnx.Rngs(0))
    model.linear.kernel[...] = model.linear.kernel[...] * jnp.nan
    return loss, (model, ones(3, 4)), {}


@fault("rsqrt", "rsqrt of 0", is_backward=True, path="norm")
def nnx_norm_without_eps():
    class Norm(nnx.Module):
        def __call__(self, x):
            size = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))  # FAULT
            return jnp.where(jnp.isfinite(size), x * size, 0)

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norm = Norm()

        def __call__(self, x):
            return self.norm(self.linear(x))

    def loss(model, x):
        return model(x).sum()

    return loss, (Network(nnx.Rngs(0)), jnp.zeros((3, 4))), {}
