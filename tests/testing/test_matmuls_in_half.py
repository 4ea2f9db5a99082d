"""`assert_matmuls_in_half` weighs every matmul of a program, wherever it stands."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

import jaxmp
from jaxmp import errors
from jaxmp.testing import assert_matmuls_in, assert_matmuls_in_half, matmuls

F32 = jax.ShapeDtypeStruct((16, 16), jnp.float32)
HALF = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)


def dot(x):
    return x @ x


def times(x, n):
    """`n` matmuls, one after the other."""
    return jax.lax.fori_loop(0, n, lambda _, y: y @ x, x)


@jax.custom_vjp
def with_rules(x):
    return x @ x


def forward(x):
    return x @ x, x


def backward(x, g):
    return (g @ x.T + x.T @ g,)


with_rules.defvjp(forward, backward)


@jax.custom_jvp
def with_tangents(x):
    return x @ x


@with_tangents.defjvp
def tangents(primals, tangents):
    (x,), (t,) = primals, tangents
    return x @ x, x @ t + t @ x


def ragged(x):
    return jax.lax.ragged_dot(x, x[None], jnp.array([16]))


def convolution(x):
    return jax.lax.conv(x[None, None], x[None, None, :4, :4], (1, 1), "VALID")


def kernel(x):
    def body(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True)(x)


def branches(x):
    return jax.lax.cond(x[0, 0] > 0, dot, lambda x: x.T @ x @ x, x)


def shared(x):
    """A quarter of the matmuls in a nested scan of 3 x 4, the rest in one of 12 x 3."""

    def few(y, _):
        return times(y, 4), ()

    def many(y, _):
        return times(y, 3), ()

    half, _ = jax.lax.scan(few, x.astype(jnp.bfloat16), length=3)
    wide, _ = jax.lax.scan(many, x, length=12)
    return half, wide


# Each with how many matmuls of its first one's size it has in float32.
WHEREVER = {
    "a function": (dot, 1),
    "jitted": (jax.jit(dot), 1),
    "a scan": (lambda x: times(x, 5), 5),
    "every branch of a cond": (branches, 3),
    "rematerialised": (jax.grad(lambda x: jax.checkpoint(dot)(x).sum()), 3),
    "a derivative rule": (with_rules, 1),
    "a backward rule": (jax.grad(lambda x: with_rules(x).sum()), 3),
    "a tangent rule": (lambda x: jax.jvp(with_tangents, (x,), (x,)), 3),
    "mapped": (jax.vmap(lambda x: jnp.outer(x, x) @ x), 1),
    "ragged": (ragged, 1),
    "a convolution": (convolution, 1),
}


@pytest.mark.parametrize("case", WHEREVER)
def test_a_matmul_counts_wherever_it_stands(case):
    fn, count = WHEREVER[case]
    assert_matmuls_in_half(fn, share=1.0)(HALF)
    with pytest.raises(AssertionError) as caught:
        assert_matmuls_in_half(fn, share=0.01)(F32)
    message = str(caught.value)
    assert message.startswith("[jaxmp] Assertion assert_matmuls_in_half failed: 0% of")
    assert "test_matmuls_in_half.py:" in message
    assert sum(map(int, re.findall(r"\((\d+) x\)", message))) == count


def test_the_share_is_one_of_flops_and_loops_count_as_often_as_they_run():
    assert_matmuls_in_half(shared, share=0.25)(F32)
    with pytest.raises(AssertionError) as caught:
        assert_matmuls_in_half(shared, share=0.26)(F32)
    message = str(caught.value)
    assert "25% of the matmul FLOPs are in half, and 26% are asked for" in message
    # 36 times 2 x 16 x 16 x 16.
    assert "(16, 16) @ (16, 16) of float32: 295 kFLOPs, 75% of all (36 x)" in message
    assert "(times.<locals>.<lambda>)" in message


def test_a_share_just_short_is_not_shown_as_if_it_held():
    def almost(x):
        return times(x.astype(jnp.bfloat16), 899_999), times(x, 100_001)

    with pytest.raises(AssertionError, match=r"89\.9% of .* 90% are asked for"):
        assert_matmuls_in_half(almost)(F32)


def test_the_largest_come_first_and_the_rest_are_counted():
    def sizes(x):
        return [x[:n] @ x[:, :n] for n in range(1, 9)]

    with pytest.raises(AssertionError) as caught:
        assert_matmuls_in_half(sizes)(F32)
    rows = str(caught.value).splitlines()[1:-1]
    assert [row.split(" of ")[0].split("general ")[-1] for row in rows[:2]] == [
        "(8, 16) @ (16, 8)",
        "(7, 16) @ (16, 7)",
    ]
    assert rows[-1].strip() == "and 3 more"


def test_kernels_and_integers_do_not_count():
    def mostly_elsewhere(x):
        i = x.astype(jnp.int32)
        return kernel(x), i @ i, times(x.astype(jnp.float16), 9)

    assert_matmuls_in_half(mostly_elsewhere, share=1)(F32)
    with pytest.raises(AssertionError, match="has no floating matmul"):
        assert_matmuls_in_half(kernel)(F32)


def test_one_wide_operand_is_not_half_and_narrower_ones_are():
    eighth = jax.ShapeDtypeStruct((16, 16), jnp.float8_e4m3fn)

    def mixed(x, y):
        return jax.lax.dot(x, y, preferred_element_type=jnp.float32)

    assert_matmuls_in_half(mixed)(eighth, eighth)
    with pytest.raises(AssertionError, match="bfloat16 and float32"):
        assert_matmuls_in_half(mixed)(HALF, F32)


def test_an_upcast_is_called_one():
    def leaky(x):
        return (x * np.float32(0.5)) @ x

    with pytest.raises(AssertionError) as caught:
        assert_matmuls_in_half(leaky)(HALF)
    assert "made float32 by a silent upcast\nassert_no_upcast" in str(caught.value)
    with pytest.raises(AssertionError, match=r"jaxmp\.autocast"):
        assert_matmuls_in_half(dot)(F32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(x))

    def features(self, x):
        return x @ x.T


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.norm(self.dense(x))))

    def twice(self, x):
        return self(x), self(x)


LINEN = Net()
VARIABLES = jax.eval_shape(LINEN.init, jax.random.key(0), F32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def train(model):
    return lambda: assert_matmuls_in_half(model.apply)(
        VARIABLES, F32, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
    )


def nnx_loss(model, x):
    return jnp.mean(model(x) ** 2)


APPLIED = jaxmp.apply_policy(NnxNet(), "mixed_bfloat16")
HOLDS = {
    "autocast": lambda: assert_matmuls_in_half(jaxmp.autocast(dot))(F32),
    "a gradient of autocast": lambda: assert_matmuls_in_half(
        jax.jit(jax.grad(jaxmp.autocast(lambda x: dot(x).sum(), "mixed_float16"))), 1.0
    )(F32),
    "apply_policy": train(jaxmp.apply_policy(LINEN, "mixed_bfloat16")),
    "an nnx module": lambda: assert_matmuls_in_half(APPLIED)(F32),
    "a method of one": lambda: assert_matmuls_in_half(APPLIED.twice)(F32),
    "an nnx loss": lambda: assert_matmuls_in_half(nnx.grad(nnx_loss))(APPLIED, F32),
    "autocast of an nnx module": lambda: assert_matmuls_in_half(
        jaxmp.autocast(nnx_loss)
    )(NnxNet(), F32),
}
FAILS = {
    "apply": (train(LINEN), "Dense_0"),
    "an nnx module": (lambda: assert_matmuls_in_half(NnxNet())(F32), "dense"),
    "a method": (lambda: assert_matmuls_in_half(NnxNet().twice)(F32), "(2 x)"),
    "a method of apply": (
        lambda: assert_matmuls_in_half(LINEN.apply)(
            VARIABLES, F32, method=Net.features
        ),
        "(Net.features)",
    ),
    "full precision": (
        lambda: assert_matmuls_in_half(jaxmp.autocast(jaxmp.full_precision(dot)))(F32),
        "(dot)",
    ),
}


@pytest.mark.parametrize("case", HOLDS)
def test_it_holds_for_what_a_policy_is_put_on(case):
    HOLDS[case]()


@pytest.mark.parametrize("case", FAILS)
def test_it_fails_for_what_has_none(case):
    provoke, word = FAILS[case]
    with pytest.raises(AssertionError, match="0% of the matmul FLOPs") as caught:
        provoke()
    assert word in str(caught.value)


def test_nothing_is_computed_and_no_module_changes():
    before = jax.tree.leaves(nnx.state(APPLIED))
    assert_matmuls_in_half(APPLIED)(F32)
    after = jax.tree.leaves(nnx.state(APPLIED))
    assert all(x is y for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("share", [0, 1.5, -1, True, "0.9", float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(errors.InvalidAssertion, match=r"share=.* above 0 and up to 1"):
        assert_matmuls_in_half(dot, share=share)


def test_the_arguments_go_into_the_second_call():
    with pytest.raises(errors.InvalidAssertion, match=r"assert_.*\(loss_fn\)\(params"):
        assert_matmuls_in_half(jnp.ones(3))
    with pytest.raises(errors.StepDoesNotTrace):
        assert_matmuls_in_half(dot)(F32, F32)


@pytest.mark.parametrize("policy", ["mixed_fp8", "mixed_int8"])
def test_what_is_multiplied_in_a_smaller_format_counts_as_half(policy):
    def loss(w, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ w["w"]) @ w["head"]))

    step = jax.grad(jaxmp.autocast(loss, policy))
    w = {"w": F32, "head": F32}
    assert_matmuls_in_half(step, share=1.0)(w, F32)
    with pytest.raises(AssertionError, match=r"0% of the matmul FLOPs"):
        assert_matmuls_in_half(jax.grad(loss))(w, F32)
    # Where all that is left in half would pass, what is not must still be seen.
    quantized = {"mixed_fp8": "float8_e4m3fn", "mixed_int8": "int8"}[policy]
    with pytest.raises(
        AssertionError, match=rf"(?s)2 of 5 matmuls.*scaled_dot of {quantized}"
    ):
        assert_matmuls_in("bfloat16", step, w, F32)
    found = matmuls(jax.make_jaxpr(step)(w, F32))
    assert [str(m.operands[1]) for m in found].count(quantized) == 2
