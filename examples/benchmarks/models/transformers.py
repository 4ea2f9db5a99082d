"""One decoder-only transformer, written in linen, in nnx and as plain functions.

All three have the same matrices and no biases. None names a dtype; `dtype=` is for
dtypes by hand.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding


class Sizes(NamedTuple):
    """The sizes of a transformer.

    Attributes:
      width: of the residual stream.
      vocabulary: number of tokens.
      heads: of each attention.
      layers: how many there are.
      tied: whether the logits are made by the table that is looked up.
      scan: whether the layers are one layer in a loop.
      remat: whether each layer is computed again in the backward pass.
      place: where each layer's input lies, for compilers that would move it elsewhere.
    """

    width: int
    vocabulary: int
    heads: int
    layers: int = 2
    tied: bool = False
    scan: bool = False
    remat: bool = False
    place: NamedSharding | None = None

    def placed(self, x: jax.Array) -> jax.Array:
        """A layer's input where it shall lie."""
        return x if self.place is None else with_sharding_constraint(x, self.place)


SMALL = Sizes(width=256, vocabulary=2048, heads=4)
TIED = Sizes(width=512, vocabulary=8192, heads=8, tied=True)


class Model(NamedTuple):
    """A transformer that is written down.

    Attributes:
      params: the tree of its weights, as shapes.
      apply: `(params, tokens)` to logits, `[batch, length, vocabulary]`.
    """

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Causal attention of `[batch, length, width]`."""
    split = [x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v)]
    return jax.nn.dot_product_attention(*split, is_causal=True).reshape(q.shape)


# linen


class LinenBlock(nn.Module):
    """A layer in linen."""

    sizes: Sizes
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> Any:
        width = self.sizes.width
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, use_bias=False, dtype=self.dtype)
        x = self.sizes.placed(x)
        h = norm()(x)
        q, k, v = (dense(width, name=name)(h) for name in "qkv")
        x = x + dense(width, name="o")(attend(q, k, v, self.sizes.heads))
        h = nn.gelu(dense(4 * width, name="up")(norm()(x)))
        x = x + dense(width, name="down")(h)
        return (x, None) if self.sizes.scan else x


class LinenTransformer(nn.Module):
    """The transformer in linen."""

    sizes: Sizes
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        sizes = self.sizes
        table = nn.Embed(sizes.vocabulary, sizes.width, dtype=self.dtype, name="table")
        block = nn.remat(LinenBlock) if sizes.remat else LinenBlock
        x = table(tokens)
        if sizes.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=sizes.layers,
            )
            x, _ = layers(sizes, self.dtype, name="layers")(x, None)
        else:
            for i in range(sizes.layers):
                x = block(sizes, self.dtype, name=f"layer_{i}")(x)
        x = nn.LayerNorm(use_bias=False, dtype=self.dtype, name="norm")(x)
        if sizes.tied:
            return table.attend(x)
        head = nn.Dense(sizes.vocabulary, use_bias=False, dtype=self.dtype, name="head")
        return head(x)


def linen(
    sizes: Sizes, dtype: Any = None, under: Callable[[Any], Any] = lambda m: m
) -> Model:
    """The transformer in linen; `under` puts the module under a policy."""
    module = under(LinenTransformer(sizes, dtype))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)
    return Model(params, module.apply)


# nnx


class NnxBlock(nnx.Module):
    """A layer in nnx."""

    def __init__(self, sizes: Sizes, dtype: Any, rngs: nnx.Rngs):
        self.sizes, width = sizes, sizes.width
        dense = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, use_bias=False, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v, self.o = (dense(width, width) for _ in "qkvo")
        self.up, self.down = dense(width, 4 * width), dense(4 * width, width)
        self.norm_1, self.norm_2 = norm(width), norm(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.sizes.placed(x)
        h = self.norm_1(x)
        x = x + self.o(attend(self.q(h), self.k(h), self.v(h), self.sizes.heads))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NnxTransformer(nnx.Module):
    """The transformer in nnx."""

    def __init__(self, sizes: Sizes, dtype: Any, rngs: nnx.Rngs):
        self.sizes = sizes
        words, width = sizes.vocabulary, sizes.width
        self.table = nnx.Embed(words, width, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)
        if not sizes.tied:
            self.head = nnx.Linear(width, words, use_bias=False, dtype=dtype, rngs=rngs)
        if sizes.scan:

            @nnx.split_rngs(splits=sizes.layers)
            @nnx.vmap(axis_size=sizes.layers)
            def layer(rngs: nnx.Rngs) -> NnxBlock:
                return NnxBlock(sizes, dtype, rngs)

            self.layers = layer(rngs)
        else:
            blocks = [NnxBlock(sizes, dtype, rngs) for _ in range(sizes.layers)]
            self.layers = nnx.List(blocks)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        def run(x: jax.Array, block: NnxBlock) -> jax.Array:
            return block(x)

        if self.sizes.remat:
            run = nnx.remat(run)
        x = self.table(tokens)
        if self.sizes.scan:
            x = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
        else:
            for block in self.layers:
                x = run(x, block)
        x = self.norm(x)
        return self.table.attend(x) if self.sizes.tied else self.head(x)


def in_nnx(
    sizes: Sizes, dtype: Any = None, under: Callable[[Any], Any] = lambda m: m
) -> Model:
    """The transformer in nnx; `under` puts the module under a policy."""
    module = nnx.eval_shape(lambda: NnxTransformer(sizes, dtype, nnx.Rngs(0)))
    graph, params = nnx.split(under(module))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, copy=True)(tokens)

    return Model(params, apply)


# Plain functions


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm with float32 statistics, in the dtype of what it normalises."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    return (y * scale).astype(x.dtype)


def plain(sizes: Sizes, dtype: Any = None) -> Model:
    """The transformer as functions of a dictionary; `dtype` casts weights at use."""
    width, words = sizes.width, sizes.vocabulary
    matrices = dict.fromkeys("qkvo", (width, width))
    matrices |= {"up": (width, 4 * width), "down": (4 * width, width)}
    layer = {**matrices, "norm_1": (width,), "norm_2": (width,)}
    shapes: dict[str, Any] = {"table": (words, width), "norm": (width,)}
    if not sizes.tied:
        shapes["head"] = (width, words)
    if sizes.scan:
        shapes["layers"] = {n: (sizes.layers, *shape) for n, shape in layer.items()}
    else:
        shapes["layers"] = [layer] * sizes.layers

    def half(w: jax.Array) -> jax.Array:
        return w if dtype is None else w.astype(dtype)

    def block(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        x = sizes.placed(x)
        h = norm(x, w["norm_1"])
        q, k, v = (h @ half(w[name]) for name in "qkv")
        x = x + attend(q, k, v, sizes.heads) @ half(w["o"])
        h = jax.nn.gelu(norm(x, w["norm_2"]) @ half(w["up"]))
        return x + h @ half(w["down"])

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        run = jax.checkpoint(block) if sizes.remat else block
        x = half(params["table"])[tokens]
        if sizes.scan:
            x, _ = jax.lax.scan(lambda x, w: (run(x, w), None), x, params["layers"])
        else:
            for w in params["layers"]:
                x = run(x, w)
        x = norm(x, params["norm"])
        head = params["table"].T if sizes.tied else params["head"]
        return x @ half(head)

    def is_shape(x: Any) -> bool:
        return isinstance(x, tuple)

    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=is_shape
    )
    return Model(params, apply)


WRITTEN = {"linen": linen, "nnx": in_nnx, "functions": plain}
