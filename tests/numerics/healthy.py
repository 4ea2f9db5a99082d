"""Healthy programs: what they compute with infinities reaches nobody.

Each case is a function that returns `(fn, args, options)`, as in the catalogue of
faults.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxmp
from jaxmp.testing import zoo

F16, F32 = jnp.float16, jnp.float32
HEALTHY = []


def healthy(make):
    HEALTHY.append(make)
    return make


X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
MASK = np.tri(3, 4, dtype=bool)


@healthy
def infinite_mask_before_softmax():
    def loss(w):
        return jax.nn.softmax(jnp.where(MASK, w, -jnp.inf))[:, 0].sum()

    return loss, (X,), {}


@healthy
def infinite_mask_before_softmax_by_hand():
    def loss(w):
        scores = jnp.where(MASK, w, -jnp.inf)
        e = jnp.exp(scores - scores.max(-1, keepdims=True))
        return (e / e.sum(-1, keepdims=True))[:, 0].sum()

    return loss, (X,), {}


@healthy
def infinite_mask_as_an_argument():
    def loss(w, mask):
        return jax.nn.softmax(w + mask)[:, 0].sum()

    return loss, (X, np.where(MASK, 0, -np.inf).astype(np.float32)), {}


@healthy
def infinite_mask_in_float16():
    def loss(w):
        return jax.nn.softmax(jnp.where(MASK, w, -jnp.inf))[:, 0].sum()

    return loss, (X.astype(np.float16),), {"loss_scale": 1024}


@healthy
def smallest_number_as_a_mask():
    def loss(w):
        return jax.nn.softmax(jnp.where(MASK, w, jnp.finfo(F16).min)).max()

    return loss, (X.astype(np.float16),), {}


@healthy
def softmax_where():
    def loss(w):
        return jax.nn.softmax(w, where=MASK).max()

    return loss, (X,), {}


@healthy
def masked_logsumexp():
    def loss(w):
        return jax.nn.logsumexp(w, -1, where=MASK).sum()

    return loss, (X,), {}


@healthy
def causal_attention():
    def loss(w):
        x = w[None, :, None, :]
        return jax.nn.dot_product_attention(x, x, x, is_causal=True).sum()

    return loss, (X,), {"policy": "mixed_float16", "loss_scale": 2.0**12}


@healthy
def where_twice():
    def loss(w):
        safe = jnp.where(w > 0, w, 1.0)
        return jnp.where(w > 0, jnp.log(safe), 0.0).sum()

    return loss, (X,), {}


@healthy
def log_behind_a_where_without_gradient():
    def metric(w):
        return jnp.where(w > 0, jnp.log(jnp.maximum(w, 0)), 0.0).sum()

    return metric, (X,), {"backward": False}


@healthy
def stopped_gradient_behind_a_where():
    def loss(w):
        logs = jnp.log(lax.stop_gradient(jnp.maximum(w, 0)))
        return (w * jnp.where(w > 0, logs, 0.0)).sum()

    return loss, (X,), {}


@healthy
def overflow_in_a_denominator():
    def loss(w):
        return (1 / (1 + jnp.exp(-100 * w))).sum()

    return loss, (X,), {"backward": False}


@healthy
def overflow_that_saturates():
    def loss(w):
        return jnp.tanh(jnp.exp(100 * w)).sum()

    return loss, (X,), {"backward": False}


@healthy
def overflow_that_is_clipped():
    def metric(w):
        return jnp.minimum(jnp.exp(100 * w), 10.0).sum()

    return metric, (X,), {"backward": False}


@healthy
def running_maximum_from_minus_infinity():
    def loss(w):
        def body(state, x):
            largest, total = state
            new = jnp.maximum(largest, x)
            total = total * jnp.exp(largest - new) + jnp.exp(x - new)
            return (new, total), None

        (largest, total), _ = lax.scan(body, (-jnp.inf, 0.0), w.reshape(-1))
        return largest + jnp.log(total)

    return loss, (X,), {}


@healthy
def best_so_far_is_returned():
    def loss(w):
        return w.sum(), {"best": jnp.full(2, jnp.inf), "ceiling": -jnp.inf}

    return loss, (X,), {}


@healthy
def infinite_argument_that_is_kept():
    def step(w, best):
        return jnp.minimum(best, jnp.abs(w).min()), jnp.maximum(best, 0)

    return step, (X, jnp.float32(jnp.inf)), {}


@healthy
def beam_search_scores():
    def step(w):
        scores = jnp.where(jnp.arange(12) == 0, 0.0, -jnp.inf) + w.reshape(-1)
        best, index = lax.top_k(scores, 1)
        return best.sum() + index.sum()

    return step, (X,), {}


@healthy
def nan_that_is_replaced():
    def loss(w):
        return jnp.nansum(jnp.where(w > 1, jnp.nan, 1.0))

    return loss, (X,), {"backward": False}


@healthy
def checked_and_replaced():
    def loss(w):
        y = jnp.log(w)
        return jnp.where(jnp.isfinite(y), 1.0, 0.0).sum()

    return loss, (X,), {"backward": False}


@healthy
def integers_and_keys():
    def loss(w, key, tokens):
        noise = jax.random.gumbel(key, w.shape)
        keep = jax.random.bernoulli(key, 0.5, w.shape)
        return jnp.where(keep, w + noise, 0.0)[tokens].sum()

    return loss, (X, jax.random.key(0), jnp.array([0, 2])), {}


@healthy
def categorical_samples():
    def loss(w, key):
        tokens = jax.random.categorical(key, w)
        return jnp.take_along_axis(jax.nn.log_softmax(w), tokens[:, None], 1).sum()

    return loss, (X, jax.random.key(0)), {}


@healthy
def norm_with_eps():
    def loss(w):
        return jnp.sqrt(jnp.sum(w * w) + 1e-6)

    return loss, (0 * X,), {}


@healthy
def norm_of_optax():
    def loss(w):
        return optax.safe_norm(w, 1e-3)

    return loss, (0 * X,), {}


@healthy
def adam_step():
    tx = optax.adam(1e-3)

    def step(w, state):
        loss, grads = jax.value_and_grad(lambda w: jnp.sum(w**2))(w)
        updates, state = tx.update(grads, state)
        return loss, optax.apply_updates(w, updates), state

    return step, (X, tx.init(X)), {}


@healthy
def step_that_is_skipped():
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")

    def step(w, state):
        grads = {"w": w["w"] * jnp.inf}
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    params = {"w": jnp.asarray(X)}
    return step, (params, tx.init(params)), {"backward": False}


@healthy
def cross_entropy_of_extreme_logits():
    def loss(w):
        logits = 1e4 * w
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.array([0, 1, 2])
        ).mean()

    return loss, (X,), {}


@healthy
def binary_cross_entropy_of_extreme_logits():
    def loss(w):
        return optax.sigmoid_binary_cross_entropy(1e4 * w, X > 0).mean()

    return loss, (X,), {}


@healthy
def softplus_and_friends():
    def loss(w):
        w = 1e3 * w
        return (jax.nn.softplus(w) + jax.nn.silu(w) + jax.nn.gelu(w)).sum()

    return loss, (X,), {}


@healthy
def maximum_of_a_window():
    def loss(w):
        return nn.max_pool(w[None, :, :, None], (2, 2), padding="SAME").sum()

    return loss, (X,), {}


@healthy
def branches_and_loops():
    def loss(w):
        w = lax.cond(w[0, 0] > 0, jnp.exp, jnp.negative, w)
        w = lax.fori_loop(0, 3, lambda i, w: w * 0.5, w)
        return jax.checkpoint(lambda w: jnp.log1p(w * w))(w).sum()

    return loss, (X,), {}


@healthy
def unused_infinity_in_a_scan():
    def loss(w):
        def body(h, x):
            return h + x, jnp.where(x > 0, jnp.exp(1e3 * x), 0.0)

        return lax.scan(body, 0.0, w.reshape(-1))[0]

    return loss, (X,), {}


@healthy
def mean_over_devices():
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))

    def loss(w):
        def shard(w):
            return lax.pmean(jnp.where(w > 0, w, -jnp.inf).max(), "data")[None]

        spec = PartitionSpec("data")
        largest = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)
        return jnp.where(jnp.isfinite(largest(w)), 1.0, 0.0).sum()

    return loss, (X,), {"backward": False}


@healthy
def linen_batch_norm_and_dropout():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            return nn.Dropout(0.5, deterministic=False)(x)

    network = Network()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(network.init, keys, X)
    variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), shapes)

    def loss(variables, x, key):
        y, state = network.apply(
            variables, x, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return jnp.mean(y**2), state

    return loss, (variables, X, jax.random.key(1)), {"policy": "mixed_float16"}


@healthy
def nnx_batch_norm_and_dropout():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.dense(x)))

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    return loss, (Network(nnx.Rngs(0)), X), {"policy": "mixed_float16"}


def network_of_the_zoo(model):
    """A network under float16, as its users run it."""
    policy = jaxmp.get_policy("mixed_float16")
    module = jaxmp.apply_policy(model.make(), policy, rules=model.rules(policy))
    apply, params, state = model.functional(module)

    def loss(params, state, *inputs):
        output, state = apply(params, state, *inputs)
        return model.loss(output, model.target), state

    return loss, (params, state, *model.inputs), {"loss_scale": 2.0**10}


ZOO = [model for model in zoo() if model.name != "decoder_cached"]
