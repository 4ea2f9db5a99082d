"""The networks of the zoo in linen; no line of them is about precision."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_OVER_TWO_LAYERS: dict[str, Any] = {
    "variable_axes": {"params": 0, "intermediates": 0},
    "split_rngs": {"params": True, "dropout": True},
    "in_axes": (nn.broadcast, nn.broadcast),
    "length": 2,
}
_OVER_FOUR_EXPERTS: dict[str, Any] = {
    "variable_axes": {"params": 0, "intermediates": 0},
    "split_rngs": {"params": True},
    "in_axes": None,
    "axis_size": 4,
}


class MLP(nn.Module):
    hidden: int = 32

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Dense(self.hidden, name="up")(x))
        x = nn.Dropout(0.2, deterministic=not train, name="dropout")(x)
        x = nn.relu(nn.Dense(self.hidden, name="down")(x))
        return nn.Dense(10, name="head")(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        for i, features in enumerate((8, 16)):
            x = nn.Conv(features, (3, 3), name=f"conv_{i}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, name=f"norm_{i}")(x)
            x = nn.avg_pool(nn.silu(x), (2, 2), (2, 2))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


class ResidualBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def conv(name, size, stride=1):
            strides = (stride, stride)
            return nn.Conv(
                self.features, (size, size), strides, use_bias=False, name=name
            )

        def norm(name):
            return nn.BatchNorm(not train, momentum=0.9, name=name)

        y = nn.silu(norm("norm_0")(conv("conv_0", 3, self.stride)(x)))
        y = norm("norm_1")(conv("conv_1", 3)(y))
        if x.shape != y.shape:
            x = norm("norm_2")(conv("shortcut", 1, self.stride)(x))
        return nn.silu(x + y)


class ResNet(nn.Module):
    """Four stages of two blocks, as in ResNet-18."""

    def setup(self):
        self.stem = nn.Conv(4, (3, 3), use_bias=False)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.blocks = [
            ResidualBlock(4 * 2**stage, 1 if i or not stage else 2)
            for stage in range(4)
            for i in range(2)
        ]
        self.head = nn.Dense(10)

    def __call__(self, x, train=True):
        x = nn.silu(self.norm(self.stem(x), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train)
        return self.head(x.mean((1, 2)))


class Conv3D(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3, 3), name="conv_0")(x)
        x = nn.relu(nn.GroupNorm(2, name="norm")(x))
        x = nn.max_pool(x, (2, 2, 2), (2, 2, 2))
        x = nn.relu(nn.Conv(8, (3, 3, 3), name="conv_1")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2, 3)))


class Recurrent(nn.Module):
    cell: str

    def setup(self):
        self.rnn = nn.RNN(getattr(nn, self.cell)(16))
        self.head = nn.Dense(10)

    def __call__(self, x):
        outputs: Any = self.rnn(x)
        return self.head(outputs[:, -1])


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2, dropout_rate=0.1, deterministic=not train, name="attention"
        )
        x = x + attention(nn.LayerNorm(name="norm_0")(x), mask=mask)
        y = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm(name="norm_1")(x)))
        y = nn.Dense(16, name="down")(y)
        return x + nn.Dropout(0.1, deterministic=not train, name="dropout")(y), None


class Encoder(nn.Module):
    """Classifies padded sequences; one scan over the layers."""

    @nn.compact
    def __call__(self, tokens, lengths, train=True):
        valid = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        positions = self.param(
            "positions", nn.initializers.normal(0.1), (tokens.shape[1], 16)
        )
        x = nn.Embed(20, 16, name="embed")(tokens)
        x = x + jnp.broadcast_to(positions, x.shape)
        layers = nn.scan(EncoderLayer, **_OVER_TWO_LAYERS)
        x, _ = layers(name="layers")(x, nn.make_attention_mask(valid, valid), train)
        x = nn.LayerNorm(name="norm")(x)
        x = jnp.where(valid[..., None], x, 0).sum(1) / lengths[:, None].astype(x.dtype)
        return nn.Dense(4, name="head")(x)


class DecoderLayer(nn.Module):
    decode: bool

    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=2, use_bias=False, decode=self.decode, name="attention"
        )
        x = x + attention(nn.RMSNorm(name="norm_0")(x), mask=mask)
        y = nn.RMSNorm(name="norm_1")(x)
        y = nn.silu(nn.Dense(32, name="gate")(y)) * nn.Dense(32, name="up")(y)
        return x + nn.Dense(16, name="down")(y)


class Decoder(nn.Module):
    """Language model with its layers rematerialised and the head tied."""

    decode: bool = False

    def setup(self):
        layer = DecoderLayer if self.decode else nn.remat(DecoderLayer)
        self.embed = nn.Embed(20, 16)
        self.positions = nn.Embed(12, 16)
        self.layers = [layer(self.decode) for _ in range(2)]
        self.norm = nn.RMSNorm()

    def __call__(self, tokens, position=0):
        x = self.embed(tokens)
        x = x + self.positions(jnp.arange(tokens.shape[1]) + position)[None]
        mask = None if self.decode else nn.make_causal_mask(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.embed.attend(self.norm(x))


class RelativeAttention(nn.Module):
    """Over the memory and the segment, with a learned bias per distance."""

    @nn.compact
    def __call__(self, x, memory):
        context = jnp.concatenate([memory, x], axis=1)
        query = nn.DenseGeneral((2, 8), name="query")(x)
        key = nn.DenseGeneral((2, 8), name="key")(context)
        value = nn.DenseGeneral((2, 8), name="value")(context)
        length, reach = x.shape[1], context.shape[1]
        distance = (
            jnp.arange(length)[:, None] + memory.shape[1] - jnp.arange(reach)[None]
        )
        bias = self.param("bias", nn.initializers.normal(0.1), (2, reach))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
        scores = scores + bias[:, jnp.clip(distance, 0)][None]
        weights = nn.softmax(scores, where=distance >= 0)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(16, axis=(-2, -1), name="out")(y)


class TransformerXL(nn.Module):
    """A long sequence in segments, each attending to the one before it."""

    def setup(self):
        self.embed = nn.Embed(20, 16)
        self.attentions = [RelativeAttention() for _ in range(2)]
        self.ups = [nn.Dense(32) for _ in range(2)]
        self.downs = [nn.Dense(16) for _ in range(2)]
        self.norms = [nn.LayerNorm() for _ in range(4)]
        self.head = nn.Dense(20)

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
            x = self.norms[2 * i + 1](x + self.downs[i](nn.gelu(self.ups[i](x))))
        return x, inputs


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="down")(nn.relu(nn.Dense(32, name="up")(x)))


class MixtureOfExperts(nn.Module):
    """Every token goes to one of four experts; the second output balances them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed")(x)
        probabilities = nn.softmax(
            nn.Dense(4, kernel_init=nn.initializers.normal(2.0), name="router")(x)
        )
        chosen = jax.nn.one_hot(probabilities.argmax(-1), 4, dtype=x.dtype)
        experts = nn.vmap(Expert, **_OVER_FOUR_EXPERTS)
        gates = (probabilities * chosen).T[..., None]
        x = x + jnp.sum(gates * experts(name="experts")(x), axis=0)
        balance = 4 * jnp.sum(chosen.mean(0) * probabilities.mean(0))
        return nn.Dense(10, name="head")(x), balance


class Recommender(nn.Module):
    """Large tables looked up, and the products of every two of the rows."""

    def setup(self):
        self.tables = [nn.Embed(1000, 8) for _ in range(3)]
        self.dense = nn.Dense(8)
        self.up = nn.Dense(16)
        self.head = nn.Dense(1)

    def __call__(self, ids, numbers):
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        rows = jnp.stack([*rows, nn.relu(self.dense(numbers))], axis=1)
        products = jnp.einsum("bid,bjd->bij", rows, rows)
        pairs = products[:, *jnp.triu_indices(4, 1)]
        x = jnp.concatenate([rows[:, -1], pairs], axis=1)
        return self.head(nn.relu(self.up(x)))[:, 0]


class Speech(nn.Module):
    """Convolutions over time, then a recurrence in both directions."""

    def setup(self):
        self.conv = nn.Conv(16, (5,), strides=2)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.rnn = nn.Bidirectional(nn.RNN(nn.GRUCell(8)), nn.RNN(nn.GRUCell(8)))
        self.head = nn.Dense(6)

    def __call__(self, frames, train=True):
        x = self.norm(self.conv(frames), use_running_average=not train)
        return self.head(self.rnn(nn.relu(x)))


class Autoencoder(nn.Module):
    def setup(self):
        self.encoder = nn.Sequential(
            [nn.Conv(8, (3, 3), 2), nn.silu, nn.Conv(8, (3, 3), 2), nn.silu]
        )
        self.squeeze = nn.Dense(8)
        self.expand = nn.Dense(32)
        self.decoder = nn.Sequential(
            [
                nn.ConvTranspose(8, (3, 3), (2, 2)),
                nn.silu,
                nn.ConvTranspose(1, (3, 3), (2, 2)),
            ]
        )

    def __call__(self, x):
        y = self.encoder(x)
        z = self.squeeze(y.reshape(len(x), -1))
        return self.decoder(nn.silu(self.expand(z)).reshape(y.shape))


class Distillation(nn.Module):
    """A student and the frozen teacher, for the same input."""

    def setup(self):
        self.teacher = MLP(64)
        self.student = MLP(16)

    def __call__(self, x, train=True):
        return self.student(x, train), jax.lax.stop_gradient(self.teacher(x, False))


class LoRADense(nn.Module):
    """A dense layer, to be frozen, and its low-rank correction."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape_a, shape_b = (x.shape[-1], 4), (4, self.features)
        lora_a = self.param("lora_a", nn.initializers.lecun_normal(), shape_a)
        lora_b = self.param("lora_b", nn.initializers.normal(0.1), shape_b)
        y = nn.Dense(self.features, use_bias=False, name="base_module")(x)
        return y + x @ lora_a @ lora_b


class LoRA(nn.Module):
    def setup(self):
        self.layers = [LoRADense(32), LoRADense(32)]
        self.head = nn.Dense(10)

    def __call__(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return self.head(x)
