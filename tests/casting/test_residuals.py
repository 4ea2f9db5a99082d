"""An island's backward pass reads a large array for a sum no more often than needed."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxmp
from tests.support.equations import equations

LARGE = 2048
KEY = jax.random.key(0)


def large_sums(fn, *args):
    """How often each kind of reduction reads a large array."""
    return collections.Counter(
        eqn.primitive.name
        for eqn in equations(fn, *args)
        if eqn.primitive.name.startswith(("reduce_", "arg", "cum"))
        and eqn.invars[0].aval.size >= LARGE
    )


def gradient(fn):
    def scalar(w, *args):
        outs = jax.tree.leaves(fn(w, *args))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in outs)

    return jax.grad(scalar, allow_int=True)


class Normed(nn.Module):
    """A matmul, a norm and a matmul."""

    norm: nn.Module

    @nn.compact
    def __call__(self, x):
        x = self.norm(nn.Dense(64)(x))
        return nn.Dense(64)(nn.gelu(x))


def of_flax(norm):
    model = Normed(norm)
    x = jax.random.normal(KEY, (16, 8, 64))
    variables = model.init(KEY, x)
    params = {"params": variables["params"]}
    rest = {k: v for k, v in variables.items() if k != "params"}

    def fn(params, x):
        return model.apply({**params, **rest}, x, mutable=list(rest))

    return fn, params, x


def rms(x):
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def softened(x):
    z = x - lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    return z - jnp.log(jnp.sum(jnp.exp(z), -1, keepdims=True))


def cosine(x):
    unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.exp(unit @ unit.T / 0.1)


def standardised(x):
    mean, var = x.mean(0, keepdims=True), x.var(0, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5)


def written(between):
    def fn(w, x):
        return between(x @ w) @ w.T

    return fn, jax.random.normal(KEY, (64, 64)), jax.random.normal(KEY, (128, 64))


NORMS = {
    "batch": nn.BatchNorm(use_running_average=False),
    "batch-slow": nn.BatchNorm(use_running_average=False, use_fast_variance=False),
    "layer": nn.LayerNorm(),
    "group": nn.GroupNorm(8),
    "rms": nn.RMSNorm(),
    "instance": nn.InstanceNorm(),
}


def gated(x):
    """Functions with derivatives of their own, and jitted ones, in one island."""
    z = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    return jax.nn.silu(jax.jit(jnp.exp)(z)) * jax.nn.relu(z) + jax.nn.relu6(z)


WRITTEN = {
    "rms": rms,
    "gated": gated,
    "log-softmax": softened,
    "standardised": standardised,
}


@jax.custom_vjp
def softplus(x):
    return jnp.log1p(jnp.exp(x))


softplus.defvjp(
    lambda x: (softplus(x), x), lambda x, g: (g * lax.logistic(x).astype(g.dtype),)
)

IN_AN_ISLAND = {
    "custom_vjp": softplus,
    "checkpoint": jax.checkpoint(lambda z: jnp.exp(z) * z),
    "cond": lambda z: lax.cond(z[0, 0] > 0, jnp.exp, jnp.sin, z),
    "scan": lambda z: lax.scan(lambda c, r: (c + jnp.exp(r), c), z[0], z)[1],
    "vmap": jax.vmap(lambda r: r / jnp.sum(jnp.exp(r))),
    "cumsum": lambda z: jnp.exp(jnp.cumsum(z, -1) * 0.01),
    "top_k": lambda z: jnp.exp(z) * lax.top_k(z, 1)[0],
    "dropout": lambda z: jnp.exp(z) * jax.random.bernoulli(KEY, 0.5, z.shape),
    "special": lambda z: jax.scipy.special.gammaln(jnp.exp(z)),
    "fft": lambda z: jnp.abs(jnp.fft.rfft(z)).sum() * jnp.exp(z),
}


def check(fn, *args, more=0):
    by_hand = large_sums(gradient(fn), *args)
    ours = large_sums(gradient(jaxmp.autocast(fn)), *args)
    assert sum(by_hand.values())
    for name, count in ours.items():
        assert count <= by_hand[name] + more, (name, ours, by_hand)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_of_flax_computes_its_statistics_once(norm):
    check(*of_flax(NORMS[norm]))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_norm_that_a_user_wrote_computes_its_statistics_once(name):
    check(*written(WRITTEN[name]))


@pytest.mark.parametrize("name", IN_AN_ISLAND)
def test_whatever_stands_in_an_island_it_has_a_gradient(name):
    fn, w, x = written(lambda z: IN_AN_ISLAND[name](rms(z)))
    found = [jax.jit(gradient(f))(w, x).ravel() for f in (fn, jaxmp.autocast(fn))]
    ours, theirs = (g / jnp.linalg.norm(g) for g in found)
    assert ours @ theirs > 0.999
    assert str(jaxmp.explain(fn)(w, x))


def test_a_softmax_adds_up_its_rounded_shares_and_no_more():
    check(*written(jax.nn.softmax), more=1)


def test_a_similarity_computes_its_norms_once():
    fn, w, x = written(lambda x: cosine(x) @ x)
    check(fn, w, x)


def test_a_loss_over_a_vocabulary_computes_its_maximum_and_its_sum_once():
    def fn(w, x, labels):
        logits = x @ w
        picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)

    x, w = jnp.ones((64, 16)), jax.random.normal(KEY, (16, 512))
    check(fn, w, x, jnp.zeros(64, jnp.int32))


def test_numbers_alone_are_not_computed_again():
    def fn(w, x):
        return jnp.exp(jnp.mean(x @ w) ** 2)

    args = jnp.ones((64, 64)), jnp.ones((64, 64))
    differentiated = jax.grad(jaxmp.autocast(fn))
    names = {eqn.primitive.name for eqn in equations(differentiated, *args)}
    assert not names & {"checkpoint", "remat", "remat2"}
    assert jaxmp.explain(fn)(*args).backward == ()


def test_explain_says_what_is_kept_and_what_is_computed_again():
    fn, params, x = of_flax(nn.BatchNorm(use_running_average=False))
    backward = jaxmp.explain(fn)(params, x).backward
    (first,) = (found for found in backward if "rsqrt" in found.kept)
    assert first.numbers == "6 x 64"
    assert first.again[:2] == ("sub", "mul")
    assert first.islands == 1
    assert "test_residuals.py" in first.source
    assert "kept: " in str(first)
    assert "6 x 64 numbers; computed again: sub, mul" in str(first)
