"""The networks of the zoo in nnx, with the same paths as in linen."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    def __init__(self, hidden=32, *, rngs):
        self.up = nnx.Linear(64, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.up(x)))
        return self.head(nnx.relu(self.down(x)))


class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv_0 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm_0 = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.conv_1 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.norm_1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.silu(self.norm_0(self.conv_0(x))), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.silu(self.norm_1(self.conv_1(x))), (2, 2), (2, 2))
        return self.head(x.reshape(len(x), -1))


class ResidualBlock(nnx.Module):
    def __init__(self, before, features, stride, *, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, features, momentum=0.9, rngs=rngs)
        self.conv_0 = conv(before, features, (3, 3), stride)
        self.norm_0 = norm()
        self.conv_1 = conv(features, features, (3, 3))
        self.norm_1 = norm()
        if before != features:
            self.shortcut = conv(before, features, (1, 1), stride)
            self.norm_2 = norm()

    def __call__(self, x):
        y = nnx.silu(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        if x.shape != y.shape:
            x = self.norm_2(self.shortcut(x))
        return nnx.silu(x + y)


class ResNet(nnx.Module):
    """Four stages of two blocks, as in ResNet-18."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        widths = [4, 4, 4, 8, 8, 16, 16, 32, 32]
        self.blocks = nnx.List(
            ResidualBlock(before, after, after // before, rngs=rngs)
            for before, after in itertools.pairwise(widths)
        )
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Conv3D(nnx.Module):
    def __init__(self, *, rngs):
        self.conv_0 = nnx.Conv(1, 8, (3, 3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.conv_1 = nnx.Conv(8, 8, (3, 3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv_0(x)))
        x = nnx.relu(self.conv_1(nnx.max_pool(x, (2, 2, 2), (2, 2, 2))))
        return self.head(x.mean((1, 2, 3)))


class Recurrent(nnx.Module):
    def __init__(self, cell, *, rngs):
        self.rnn = nnx.RNN(getattr(nnx, cell)(8, 16, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        outputs: Any = self.rnn(x)
        return self.head(outputs[:, -1])


class EncoderLayer(nnx.Module):
    def __init__(self, *, rngs):
        self.norm_0 = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 16, dropout_rate=0.1, deterministic=False, decode=False, rngs=rngs
        )
        self.norm_1 = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm_0(x), mask=mask)
        y = self.down(nnx.gelu(self.up(self.norm_1(x))))
        return x + self.dropout(y)


class Encoder(nnx.Module):
    """Classifies padded sequences; one scan over the layers."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return EncoderLayer(rngs=rngs)

        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (12, 16)))
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.layers = stacked(rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, tokens, lengths):
        @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        def apply_layers(layer, x, mask):
            return layer(x, mask)

        valid = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        x = self.embed(tokens)
        x = x + jnp.broadcast_to(self.positions[...], x.shape)
        x = apply_layers(self.layers, x, nnx.make_attention_mask(valid, valid))
        x = self.norm(x)
        x = jnp.where(valid[..., None], x, 0).sum(1) / lengths[:, None].astype(x.dtype)
        return self.head(x)


class DecoderLayer(nnx.Module):
    def __init__(self, *, rngs):
        self.norm_0 = nnx.RMSNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 16, use_bias=False, deterministic=False, decode=False, rngs=rngs
        )
        self.norm_1 = nnx.RMSNorm(16, rngs=rngs)
        self.gate = nnx.Linear(16, 32, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm_0(x), mask=mask)
        y = self.norm_1(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Language model with its layers rematerialised and the head tied."""

    def __init__(self, decode=False, *, rngs):
        self.decode = decode
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.positions = nnx.Embed(12, 16, rngs=rngs)
        self.layers = nnx.List(DecoderLayer(rngs=rngs) for _ in range(2))
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        if decode:
            for layer in self.layers:
                layer.attention.set_attributes(decode=True)
                layer.attention.init_cache((2, 12, 16))

    def __call__(self, tokens, position=0):
        x = self.embed(tokens)
        x = x + self.positions(jnp.arange(tokens.shape[1]) + position)[None]
        mask = None if self.decode else nnx.make_causal_mask(tokens)
        for layer in self.layers:
            if self.decode:
                x = layer(x, mask)
            else:
                x = nnx.remat(DecoderLayer.__call__)(layer, x, mask)
        return self.embed.attend(self.norm(x))


class RelativeAttention(nnx.Module):
    """Over the memory and the segment, with a learned bias per distance."""

    def __init__(self, *, rngs):
        self.query = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.key = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.value = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 8), 16, axis=(-2, -1), rngs=rngs)
        self.bias = nnx.Param(0.1 * jax.random.normal(rngs.params(), (2, 8)))

    def __call__(self, x, memory):
        context = jnp.concatenate([memory, x], axis=1)
        length, reach = x.shape[1], context.shape[1]
        distance = (
            jnp.arange(length)[:, None] + memory.shape[1] - jnp.arange(reach)[None]
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", self.query(x), self.key(context))
        scores = scores / 8**0.5 + self.bias[...][:, jnp.clip(distance, 0)][None]
        weights = nnx.softmax(scores, where=distance >= 0)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, self.value(context))
        return self.out(y)


class TransformerXL(nnx.Module):
    """A long sequence in segments, each attending to the one before it."""

    def __init__(self, *, rngs):
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.attentions = nnx.List(RelativeAttention(rngs=rngs) for _ in range(2))
        self.ups = nnx.List(nnx.Linear(16, 32, rngs=rngs) for _ in range(2))
        self.downs = nnx.List(nnx.Linear(32, 16, rngs=rngs) for _ in range(2))
        self.norms = nnx.List(nnx.LayerNorm(16, rngs=rngs) for _ in range(4))
        self.head = nnx.Linear(16, 20, rngs=rngs)

    def __call__(self, tokens):
        segments = jnp.split(self.embed(tokens), 3, axis=1)
        memories = [jnp.zeros_like(segments[0])] * 2
        outputs = []
        for x in segments:
            x, memories = self.segment(x, memories)
            outputs.append(self.head(x))
        return jnp.concatenate(outputs, axis=1)

    def segment(self, x, memories):
        inputs = []
        for i, memory in enumerate(memories):
            inputs.append(x)
            y = self.attentions[i](x, jax.lax.stop_gradient(memory))
            x = self.norms[2 * i](x + y)
            x = self.norms[2 * i + 1](x + self.downs[i](nnx.gelu(self.ups[i](x))))
        return x, inputs


class Expert(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class MixtureOfExperts(nnx.Module):
    """Every token goes to one of four experts; the second output balances them."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return Expert(rngs=rngs)

        wide = nnx.initializers.normal(2.0)
        self.embed = nnx.Linear(64, 16, rngs=rngs)
        self.router = nnx.Linear(16, 4, kernel_init=wide, rngs=rngs)
        self.experts = stacked(rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        @nnx.vmap(in_axes=(0, None), out_axes=0)
        def apply_experts(expert, x):
            return expert(x)

        x = self.embed(x)
        probabilities = nnx.softmax(self.router(x))
        chosen = jax.nn.one_hot(probabilities.argmax(-1), 4, dtype=x.dtype)
        gates = (probabilities * chosen).T[..., None]
        x = x + jnp.sum(gates * apply_experts(self.experts, x), axis=0)
        balance = 4 * jnp.sum(chosen.mean(0) * probabilities.mean(0))
        return self.head(x), balance


class Recommender(nnx.Module):
    """Large tables looked up, and the products of every two of the rows."""

    def __init__(self, *, rngs):
        self.tables = nnx.List(nnx.Embed(1000, 8, rngs=rngs) for _ in range(3))
        self.dense = nnx.Linear(5, 8, rngs=rngs)
        self.up = nnx.Linear(14, 16, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, ids, numbers):
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        rows = jnp.stack([*rows, nnx.relu(self.dense(numbers))], axis=1)
        products = jnp.einsum("bid,bjd->bij", rows, rows)
        pairs = products[:, *jnp.triu_indices(4, 1)]
        x = jnp.concatenate([rows[:, -1], pairs], axis=1)
        return self.head(nnx.relu(self.up(x)))[:, 0]


class Speech(nnx.Module):
    """Convolutions over time, then a recurrence in both directions."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(12, 16, (5,), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.rnn = nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(16, 8, rngs=rngs), rngs=rngs),
            nnx.RNN(nnx.GRUCell(16, 8, rngs=rngs), rngs=rngs),
            rngs=rngs,
        )
        self.head = nnx.Linear(16, 6, rngs=rngs)

    def __call__(self, frames):
        x = self.norm(self.conv(frames))
        outputs: Any = self.rnn(nnx.relu(x))
        return self.head(outputs)


class Autoencoder(nnx.Module):
    def __init__(self, *, rngs):
        self.encoder = nnx.Sequential(
            nnx.Conv(1, 8, (3, 3), 2, rngs=rngs),
            nnx.silu,
            nnx.Conv(8, 8, (3, 3), 2, rngs=rngs),
            nnx.silu,
        )
        self.squeeze = nnx.Linear(32, 8, rngs=rngs)
        self.expand = nnx.Linear(8, 32, rngs=rngs)
        self.decoder = nnx.Sequential(
            nnx.ConvTranspose(8, 8, (3, 3), 2, rngs=rngs),
            nnx.silu,
            nnx.ConvTranspose(8, 1, (3, 3), 2, rngs=rngs),
        )

    def __call__(self, x):
        y = self.encoder(x)
        z = self.squeeze(y.reshape(len(x), -1))
        return self.decoder(nnx.silu(self.expand(z)).reshape(y.shape))


class Distillation(nnx.Module):
    """A student and the frozen teacher, for the same input."""

    def __init__(self, *, rngs):
        self.teacher = MLP(64, rngs=rngs)
        self.teacher.eval()
        self.student = MLP(16, rngs=rngs)

    def __call__(self, x):
        return self.student(x), jax.lax.stop_gradient(self.teacher(x))


class LoRA(nnx.Module):
    def __init__(self, *, rngs):
        def layer(before, after):
            base = nnx.Linear(before, after, use_bias=False, rngs=rngs)
            normal = nnx.initializers.normal(0.1)
            return nnx.LoRA(
                before, 4, after, base_module=base, b_initializer=normal, rngs=rngs
            )

        self.layers = nnx.List([layer(64, 32), layer(32, 32)])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)
