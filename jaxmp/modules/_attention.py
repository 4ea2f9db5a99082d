"""Attention with a float32 softmax and all matmuls in half."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> jax.Array:
    """Computes what Flax's functions of this name do, in linen and in nnx.

    With a float32 softmax, theirs also multiply in float32: linen's the weights with
    the values, nnx's the gradients of float32 scores.

    Args:
      query: `[batch..., queries, heads, depth]`.
      key: `[batch..., keys, heads or a divisor, depth]`.
      value: `[batch..., keys, heads or a divisor, depth of values]`.
      bias: added to the scores in float32; `[batch..., heads, queries, keys]`.
      mask: False where attention is masked out; broadcast like the bias.
      broadcast_dropout, dropout_rng, dropout_rate, deterministic: as in Flax.
      dtype: half dtype of the matmuls and of the result.
      precision: precision of the matmuls.
      module: the module to sow the weights in, as Flax does, if given.
      is_causal: whether to mask the keys that come after a query.
      **kwargs: arguments of other attention functions; ignored.

    Returns:
      `[batch..., queries, heads, depth of values]` in `dtype`.
    """
    del kwargs
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    key, value = (_repeat_heads(x, query.shape[-2]) for x in (key, value))
    query = query / jnp.sqrt(query.shape[-1]).astype(dtype)
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key, precision=precision)
    if is_causal:
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    weights = _softmax(scores, bias, mask)
    if module is not None:
        sown_in: Any = "intermediates"
        if isinstance(module, nnx.Module):
            sown_in = nnx.Intermediate
        module.sow(sown_in, "attention_weights", weights)
    if dropout_rate > 0.0 and not deterministic:
        shared = (1,) * (key.ndim - 2) if broadcast_dropout else weights.shape[:-2]
        shape = shared + weights.shape[-2:]
        keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, shape)
        kept = jnp.asarray(1.0 - dropout_rate, dtype)
        weights = weights * (keep.astype(dtype) / kept)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)


def _repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    return x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], axis=-2)


def _softmax(
    scores: jax.Array, bias: jax.Array | None, mask: jax.Array | None
) -> jax.Array:
    """A softmax over the last axis of half scores: float32 inside, half outside.

    Multiplying by the sum's reciprocal, instead of dividing by the sum, keeps no more
    for the backward pass than a softmax in half does, with the H100's compiler and with
    the TPU's, where the traffic is even less.
    """
    dtype = scores.dtype
    if bias is not None:
        scores = scores.astype(jnp.float32) + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask.astype(bool), scores, jnp.finfo(dtype).min)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    shifted = scores.astype(jnp.float32) - largest.astype(jnp.float32)
    exponentials = jnp.exp(shifted)
    total = exponentials.sum(-1, keepdims=True)
    return (exponentials * (1.0 / total)).astype(dtype)
