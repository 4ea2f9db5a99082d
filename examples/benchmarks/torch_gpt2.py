"""GPT-2 as people write it in PyTorch: the layers of `models/gpt2.py`, in its sizes."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from gpt2_sizes import NORM_EPSILON, Sizes
from torch import nn


class Attention(nn.Module):
    """Causal self-attention with one matmul for queries, keys and values.

    Args:
      sizes: of the model.
      fused: whether it calls `scaled_dot_product_attention`; else softmax is written
        out, as it is in Flax.
    """

    mask: torch.Tensor

    def __init__(self, sizes: Sizes, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = sizes.heads, fused
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        ones = torch.ones(sizes.length, sizes.length, dtype=torch.bool)
        self.register_buffer("mask", ones.tril(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~self.mask[:length, :length], -math.inf)
            mixed = F.softmax(scores, dim=-1).to(v.dtype) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer block that normalises before each half."""

    def __init__(self, sizes: Sizes, *, fused: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(sizes.width, eps=NORM_EPSILON)
        self.attention = Attention(sizes, fused=fused)
        self.norm_2 = nn.LayerNorm(sizes.width, eps=NORM_EPSILON)
        self.hidden = nn.Linear(sizes.width, 4 * sizes.width)
        self.out = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        hidden = F.gelu(self.hidden(self.norm_2(x)), approximate="tanh")
        return x + self.out(hidden)


class GPT2(nn.Module):
    """Returns the mean loss of a batch; its logits come from the table of tokens.

    Args:
      sizes: of the model.
      fused: whether attention is PyTorch's fused one.
    """

    def __init__(self, sizes: Sizes, *, fused: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.length, sizes.width)
        blocks = [Block(sizes, fused=fused) for _ in range(sizes.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(sizes.width, eps=NORM_EPSILON)
        self.apply(_first_values)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _first_values(module: nn.Module) -> None:
    """GPT-2's own: normal with deviation 0.02, and no biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
