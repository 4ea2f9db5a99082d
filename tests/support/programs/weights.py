"""Programs that use weights in every way, as `loss(params, x)` with arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Loss = Callable[[Any, Any], jax.Array]
Program = tuple[Loss, tuple[Any, Any]]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) * 0.3


W, V, X = normal(0, 8, 8), normal(2, 8, 8), normal(1, 4, 8)
STACK, IMAGES, SEQUENCE = normal(3, 3, 8, 8), normal(1, 2, 6, 6, 4), normal(1, 2, 3, 8)


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def conv(x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return jnp.tanh(
        lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)
    )


def scan(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (layer(h, w), None), x, p["w"])[0].sum()


def scan_of_a_constant(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, _: (layer(h, p["w"]), None), x, None, length=3)[0].sum()


def scan_of_rematerialised(p: Any, x: jax.Array) -> jax.Array:
    body = jax.checkpoint(lambda h, w: (layer(h, w), None))
    return lax.scan(body, x, p["w"])[0].sum()


def scans_in_a_scan(p: Any, x: jax.Array) -> jax.Array:
    def outer(h: jax.Array, _: Any) -> Any:
        return lax.scan(lambda h, w: (layer(h, w), None), h, p["w"])[0], None

    return lax.scan(outer, x, None, length=2)[0].sum()


def recurrent(p: Any, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, x: jax.Array) -> Any:
        h = jnp.tanh(x @ p["w"] + h @ p["v"])
        return h, h

    return lax.scan(step, jnp.zeros((3, 8)), x)[1].sum()


def unrolled(p: Any, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = layer(x, p["w"][i])
    return x.sum()


def picked_in_a_loop(p: Any, x: jax.Array) -> jax.Array:
    def body(h: jax.Array, i: jax.Array) -> Any:
        return layer(h, lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), None

    return lax.scan(body, x, jnp.arange(3))[0].sum()


def branches(p: Any, x: jax.Array) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        return layer(x, p["w"])

    return lax.cond(x.sum() > 0, one, lambda x: x @ p["v"], x).sum()


def behind_a_while(p: Any, x: jax.Array) -> jax.Array:
    fixed = lax.stop_gradient(p["v"])
    start = (0, lax.stop_gradient(x))
    more = lambda c: c[0] < 3  # noqa: E731
    x = lax.while_loop(more, lambda c: (c[0] + 1, layer(c[1], fixed)), start)[1]
    return layer(x, p["w"]).sum()


@jax.custom_vjp
def product(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


product.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T)
)


@jax.custom_vjp
def identity(w: jax.Array) -> jax.Array:
    return w * 1.0


identity.defvjp(lambda w: (w, None), lambda _, g: (g,))


def attention(p: Any, x: jax.Array) -> jax.Array:
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    shares = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, q))
    mixed = jnp.einsum("bhts,bshk->bthk", shares, q)
    return jnp.einsum("bthk,hkd->btd", mixed, p["o"]).sum()


def experts(p: Any, x: jax.Array) -> jax.Array:
    shares = jax.nn.softmax(x @ p["gate"])
    sent = jax.nn.one_hot(jnp.argmax(shares, -1), 4)
    hidden = jnp.einsum("be,bd->ebd", sent, x)
    hidden = jax.nn.gelu(jnp.einsum("ebd,edf->ebf", hidden, p["w"]))
    return jnp.einsum("ebf,be,be->bf", hidden, sent, shares).sum()


def grouped_tokens(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(lax.ragged_dot(x, p["w"], jnp.array([1, 2, 1], jnp.int32))).sum()


def split_weight(p: Any, x: jax.Array) -> jax.Array:
    a, b, c = jnp.split(p["w"], 3, axis=1)
    return (jnp.tanh(x @ a) * (x @ b) * (x @ c)).sum()


def cast_once_by_hand(p: Any, x: jax.Array) -> jax.Array:
    w, x = p["w"].astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    for _ in range(2):
        x = layer(x, w)
    return x.astype(jnp.float32).sum()


def over_devices(p: Any, x: jax.Array) -> jax.Array:
    count = min(4, jax.device_count())
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))

    def loss(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        w = lax.all_gather(w, "data", tiled=True)
        return lax.pmean(layer(layer(x, w), v).sum(), "data")

    specs = (P("data"), P(), P("data"))
    run = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    return run(p["w"], p["v"], x)


def tied(p: Any, tokens: jax.Array) -> jax.Array:
    x = layer(p["table"][tokens], p["w"])
    return -jax.nn.log_softmax(x @ p["table"].T)[..., 0].sum()


TWO, ONE = {"w": W, "v": V}, {"w": W}
FLAT, unravel = ravel_pytree(TWO)
TOKENS = jnp.array([[1, 2, 2], [3, 1, 0]])

PROGRAMS: dict[str, Program] = {
    "two layers": (lambda p, x: layer(layer(x, p["w"]), p["v"]).sum(), (TWO, SEQUENCE)),
    "jit": (lambda p, x: jax.jit(layer)(x, p["w"]).sum(), (ONE, X)),
    "scan": (scan, ({"w": STACK}, X)),
    "scan of a constant": (scan_of_a_constant, (ONE, X)),
    "scan of remat": (scan_of_rematerialised, ({"w": STACK}, X)),
    "scans in a scan": (scans_in_a_scan, ({"w": STACK}, X)),
    "recurrent": (recurrent, (TWO, normal(1, 2, 3, 8))),
    "unrolled": (unrolled, ({"w": STACK}, X)),
    "picked in a loop": (picked_in_a_loop, ({"w": STACK}, X)),
    "remat": (lambda p, x: jax.checkpoint(layer)(x, p["w"]).sum(), (ONE, X)),
    "vmap of rows": (
        lambda p, x: jax.vmap(layer, (0, None))(x, p["w"]).sum(),
        (ONE, X),
    ),
    "vmap of weights": (
        lambda p, x: jax.vmap(layer, (None, 0))(x, p["w"]).sum(),
        ({"w": STACK}, X),
    ),
    "vmap of both": (
        lambda p, x: jax.vmap(layer)(x, p["w"]).sum(),
        ({"w": normal(3, 4, 8, 8)}, X),
    ),
    "cond": (branches, (TWO, X)),
    "while": (behind_a_while, (TWO, X)),
    "custom_vjp": (lambda p, x: jnp.tanh(product(p["w"], x)).sum(), (ONE, X)),
    "custom_vjp of a weight": (
        lambda p, x: layer(x, identity(p["w"])).sum(),
        (ONE, X),
    ),
    "grouped convolution": (
        lambda p, x: conv(x, p["w"], feature_group_count=2).sum(),
        ({"w": normal(0, 3, 3, 2, 8)}, IMAGES),
    ),
    "depthwise convolution": (
        lambda p, x: conv(x, p["w"], feature_group_count=4).sum(),
        ({"w": normal(0, 3, 3, 1, 4)}, IMAGES),
    ),
    "dilated convolution": (
        lambda p, x: conv(x, p["w"], rhs_dilation=(2, 2), window_strides=(2, 2)).sum(),
        ({"w": normal(0, 3, 3, 4, 8)}, IMAGES),
    ),
    "transposed convolution": (
        lambda p, x: jnp.tanh(lax.conv_transpose(x, p["w"], (2, 2), "SAME")).sum(),
        ({"w": normal(0, 3, 3, 4, 8)}, IMAGES),
    ),
    "groups of the batch": (
        lambda p, x: conv(x, p["w"], batch_group_count=2).sum(),
        ({"w": normal(0, 3, 3, 4, 8)}, IMAGES),
    ),
    "einsum with a batch": (
        lambda p, x: jnp.tanh(jnp.einsum("ebd,edf->ebf", x, p["w"])).sum(),
        ({"w": normal(0, 5, 8, 6)}, normal(1, 5, 4, 8)),
    ),
    "attention": (
        attention,
        ({"q": normal(0, 8, 2, 4), "o": normal(2, 2, 4, 8)}, SEQUENCE),
    ),
    "experts": (experts, ({"w": normal(0, 4, 8, 8), "gate": normal(5, 8, 4)}, X)),
    "ragged_dot": (grouped_tokens, ({"w": STACK}, X)),
    "transposed": (lambda p, x: layer(x, p["w"].T).sum(), (ONE, SEQUENCE)),
    "tied": (lambda p, x: (layer(x, p["w"]) @ p["w"].T).sum(), (ONE, X)),
    "tied table": (tied, ({"table": normal(0, 10, 8), "w": W}, TOKENS)),
    "one-hot table": (
        lambda p, t: (jax.nn.one_hot(t, 10) @ p["table"] @ p["w"]).sum(),
        ({"table": normal(0, 10, 8), "w": W}, TOKENS),
    ),
    "split": (split_weight, ({"w": normal(0, 8, 12)}, X)),
    "concatenated": (
        lambda p, x: layer(x, jnp.concatenate([p["w"], p["v"]], 1)).sum(),
        (TWO, X),
    ),
    "stacked": (
        lambda p, x: jnp.tanh(
            jnp.einsum("bd,ndf->nbf", x, jnp.stack([p["w"], p["v"]]))
        ).sum(),
        (TWO, X),
    ),
    "flat": (lambda p, x: layer(x, p.reshape(8, 8)).sum(), (W.ravel(), X)),
    "ravelled": (
        lambda p, x: layer(layer(x, unravel(p)["w"]), unravel(p)["v"]).sum(),
        (FLAT, X),
    ),
    "scaled": (lambda p, x: layer(x, p["w"] * 8**-0.5).sum(), (ONE, X)),
    "selected": (
        lambda p, x: layer(x, jnp.where(jnp.tri(8) > 0, p["w"], 0)).sum(),
        (ONE, X),
    ),
    "beside a low rank": (
        lambda p, x: jnp.tanh(x @ p["w"] + 2 * (x @ p["a"]) @ p["b"]).sum(),
        ({"w": W, "a": normal(4, 8, 2), "b": normal(5, 2, 8)}, X),
    ),
    "cast by hand": (cast_once_by_hand, (ONE, X)),
    "shard_map": (over_devices, (TWO, normal(1, 8, 8))),
}
"""Programs by what is special about them."""
