"""GPT-2's sizes and its optimizer's numbers, for every library that trains it."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """A GPT-2 and its batch; GPT-2 small (Radford et al., 2019) by default.

    Attributes:
      batch: sequences in a batch.
      length: tokens in a sequence, and positions that the model knows.
      vocabulary: tokens there are.
      width: of the residual stream; the hidden layers are four times as wide.
      layers: blocks.
      heads: of each attention.
    """

    batch: int = 8
    length: int = 1024
    vocabulary: int = 50257
    width: int = 768
    layers: int = 12
    heads: int = 12

    @property
    def parameters(self) -> int:
        """Their number; the table of tokens is also the last layer."""
        norm, width = 2 * self.width, self.width
        attention = 4 * (width * width + width)
        hidden = width * 4 * width + 4 * width + 4 * width * width + width
        block = attention + hidden + 2 * norm
        return (self.vocabulary + self.length) * width + self.layers * block + norm

    @property
    def shape(self) -> str:
        return f"{self.batch} x {self.length} tokens, AdamW"


class AdamW(NamedTuple):
    """The numbers of AdamW; Optax's defaults, which are not PyTorch's."""

    rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4


SMALL = Sizes()
TINY = Sizes(batch=4, length=16, vocabulary=64, width=32, layers=1, heads=2)
NORM_EPSILON = 1e-6
"""Flax's in LayerNorm; PyTorch's default is 1e-5."""
