"""Transformer-XL (Dai et al., 2019), its base size for WikiText-103, without dropout.

Layers, tied embeddings, shared attention biases and the adaptive softmax are those of
the authors' PyTorch code. One thing differs, because shapes are static here: a cluster
of rare tokens has room for an eighth of a batch's tokens. About one token in sixteen
of WikiText-103 is rare; a token beyond the room loses its part within the cluster.
"""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen.dtypes import promote_dtype

from models._job import Job, cross_entropy


def relative_shift(x: jax.Array) -> jax.Array:
    """Turns scores by distance, [..., query, distance], into scores by key."""
    *batch, queries, keys = x.shape
    x = jnp.pad(x, [(0, 0)] * (len(batch) + 1) + [(1, 0)])
    x = x.reshape(*batch, keys + 1, queries)
    return x[..., 1:, :].reshape(*batch, queries, keys)


def sinusoids(length: int, width: int) -> jax.Array:
    """Embeddings of the distances length - 1 down to 0, of shape [length, width]."""
    frequencies = 10000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length - 1, -1, -1)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class RelativeAttention(nn.Module):
    """Attention of a segment to itself and to the memory before it."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
        distances: jax.Array,
        content_bias: jax.Array,
        distance_bias: jax.Array,
    ) -> jax.Array:
        batch, queries, width = x.shape
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        seen = jnp.concatenate([memory, x], axis=1)
        keys = seen.shape[1]
        qkv = dense(3 * width, name="qkv")(seen).reshape(batch, keys, self.heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        r = dense(width, name="distances")(distances).reshape(keys, self.heads, -1)
        q, k, v, r, content_bias, distance_bias = promote_dtype(
            q[:, -queries:], k, v, r, content_bias, distance_bias, dtype=self.dtype
        )
        by_content = jnp.einsum("bqhd,bkhd->bhqk", q + content_bias[None, None], k)
        by_distance = jnp.einsum("bqhd,khd->bhqk", q + distance_bias[None, None], r)
        scores = (by_content + relative_shift(by_distance)) * q.shape[-1] ** -0.5
        visible = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)
        scores = jnp.where(visible[None, None], scores, jnp.finfo(scores.dtype).min)
        h = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return dense(width, name="out")(h.reshape(x.shape))


class Block(nn.Module):
    """A block that normalises after each half and remembers its input."""

    heads: int
    inner: int
    memory: int
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        distances: jax.Array,
        content_bias: jax.Array,
        distance_bias: jax.Array,
    ) -> jax.Array:
        batch, _, width = x.shape
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        memory = self.variable(
            "memory",
            "hidden",
            jnp.zeros,
            (batch, self.memory, width),
            self.dtype or jnp.float32,
        )
        before = memory.value.astype(x.dtype)
        h = RelativeAttention(self.heads, self.dtype, name="attention")(
            x, before, distances, content_bias, distance_bias
        )
        if not self.is_initializing():
            now = jnp.concatenate([before, x], axis=1)[:, -self.memory :]
            memory.value = jax.lax.stop_gradient(now).astype(memory.value.dtype)
        x = norm()(x + h)
        h = nn.relu(nn.Dense(self.inner, dtype=self.dtype)(x))
        return norm()(x + nn.Dense(width, dtype=self.dtype)(h))


class AdaptiveSoftmax(nn.Module):
    """The loss of each label: frequent tokens compete with clusters of rare ones."""

    cutoffs: tuple[int, ...]
    room: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array, table: jax.Array) -> jax.Array:
        x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
        ends = (*self.cutoffs, len(table))
        clusters = len(ends) - 1
        zeros = nn.initializers.zeros
        cluster_rows = self.param("clusters", zeros, (clusters, x.shape[-1]))
        cluster_bias = self.param("cluster_bias", zeros, (clusters,))
        bias = self.param("bias", zeros, (len(table),))
        x, table, bias, cluster_rows, cluster_bias = promote_dtype(
            x, table, bias, cluster_rows, cluster_bias, dtype=self.dtype
        )
        head = jnp.concatenate([table[: ends[0]], cluster_rows])
        head_bias = jnp.concatenate([bias[: ends[0]], cluster_bias])
        cluster = jnp.searchsorted(jnp.array(ends), labels, side="right")
        target = jnp.where(cluster == 0, labels, ends[0] + cluster - 1)
        losses = cross_entropy(x @ head.T + head_bias[None], target)
        for i, (start, end) in enumerate(itertools.pairwise(ends), 1):
            size = max(1, len(labels) // self.room)
            rare = jnp.flatnonzero(cluster == i, size=size, fill_value=len(labels))
            rows = x.at[rare].get(mode="fill", fill_value=0)
            targets = labels.at[rare].get(mode="fill", fill_value=start) - start
            logits = rows @ table[start:end].T + bias[None, start:end]
            losses = losses.at[rare].add(cross_entropy(logits, targets), mode="drop")
        return losses


class TransformerXL(nn.Module):
    """Returns the loss of each following token; the base size by default."""

    vocabulary: int = 267735
    cutoffs: tuple[int, ...] = (20000, 40000, 200000)
    room: int = 8
    memory: int = 150
    width: int = 410
    inner: int = 2100
    layers: int = 16
    heads: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array, following: jax.Array) -> jax.Array:
        table = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="table")
        x = table(tokens) * self.width**0.5
        distances = sinusoids(self.memory + tokens.shape[1], self.width).astype(x.dtype)
        shape = (self.heads, self.width // self.heads)
        normal = nn.initializers.normal(0.02)
        biases = [
            self.param(f"{by}_bias", normal, shape) for by in ("content", "distance")
        ]
        for i in range(self.layers):
            x = Block(
                self.heads, self.inner, self.memory, self.dtype, name=f"block_{i}"
            )(x, distances, *biases)
        softmax = AdaptiveSoftmax(self.cutoffs, self.room, self.dtype, name="softmax")
        return softmax(x, following, table.embedding)


def batch(
    key: jax.Array, size: int, length: int, vocabulary: int
) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Random tokens and those that follow each; here the labels are inputs."""
    tokens = jax.random.randint(key, (size, length + 1), 0, vocabulary)
    return (tokens[:, :-1], tokens[:, 1:]), None


def loss(losses: jax.Array, labels: None) -> jax.Array:
    del labels
    return losses.mean()


JOB = Job(
    model=TransformerXL,
    batch=functools.partial(batch, size=60, length=150, vocabulary=267735),
    loss=loss,
    optimizer=optax.adamw(2.5e-4),
    shape="60 x 150 tokens and a memory of 150, AdamW",
)
TINY_JOB = Job(
    model=functools.partial(
        TransformerXL,
        vocabulary=96,
        cutoffs=(32, 64),
        room=1,
        memory=16,
        width=32,
        inner=64,
        layers=1,
        heads=2,
    ),
    batch=functools.partial(batch, size=4, length=16, vocabulary=96),
    loss=loss,
    optimizer=optax.adamw(1e-3),
    shape="4 x 16 tokens and a memory of 16, AdamW",
)
