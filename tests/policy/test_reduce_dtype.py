"""The reduce dtype of a policy: read, written, compared, refused, and shown."""

import pickle
import re

import jax.numpy as jnp
import jmp
import optax
import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import CheckpointPolicyMismatch, InvalidRule, PolicyError
from jaxmp.policy import Policy, get_policy
from jaxmp.training import Checkpoints

WIDE = "mixed_bfloat16,reduce=float32"


@pytest.mark.parametrize(
    "text",
    [
        WIDE,
        "mixed_float16, reduce=f32",
        "bf16-true,reduce=full",
        "p=f32,c=bf16,o=f32,reduce=bf16",
        "mixed_bfloat16,matmul=tf32,reduce=float32",
        "reduce=float32,compute=bfloat16",
        "float32,reduce=float32",
    ],
)
def test_a_policy_reads_what_it_writes(text):
    policy = get_policy(text)
    assert policy.reduce_dtype is not None
    assert get_policy(str(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(get_policy(str(policy))) == hash(policy)


def test_it_is_part_of_the_value():
    plain, wide = get_policy("mixed_bfloat16"), get_policy(WIDE)
    assert plain != wide
    assert wide == Policy("float32", "bfloat16", "float32", reduce_dtype=jnp.float32)
    assert plain == jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    assert wide != jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    assert wide.with_output_dtype("bfloat16").reduce_dtype == jnp.float32
    assert len({plain, wide}) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mixed_bfloat16,reduce=float16", ["float16 needs a loss scale"]),
        ("mixed_float16,reduce=bfloat16", ["narrower", "reduce=float32"]),
        ("float32,reduce=bfloat16", ["narrower", "compute_dtype=float32"]),
        ("float32,reduce=float16", ["float16 needs a loss scale", "reduce=float32"]),
        ("mixed_bfloat16,reduce=float64", ["no matmul returns so wide a sum"]),
        ("mixed_bfloat16,reduce=int8", ["Unknown dtype 'int8'"]),
        ("mixed_bfloat16,reduce=", ["Unknown dtype ''"]),
        ("mixed_bfloat16,reduce=float8_e4m3fn", ["narrower", "reduce=float32"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_repair(text, words):
    with pytest.raises(PolicyError) as caught:
        get_policy(text)
    for word in words:
        assert word in str(caught.value)


def test_a_policy_made_of_dtypes_is_checked_alike():
    with pytest.raises(PolicyError, match="Unknown dtype 3 as reduce_dtype"):
        Policy("float32", "bfloat16", "float32", reduce_dtype=3)
    with pytest.raises(PolicyError, match="reduce=float32"):
        Policy("float32", "bfloat16", "float32", reduce_dtype="float16")


def test_rules_are_checked_alike():
    rule = jaxmp.PolicyRule(path="head", reduce="f32")
    assert rule.reduce == jnp.float32
    assert "reduce=float32" in str(rule)
    with pytest.raises(InvalidRule, match="'int8' as reduce= of a rule"):
        jaxmp.PolicyRule(path="head", reduce="int8")
    with pytest.raises(PolicyError, match="narrower"):
        jaxmp.PolicyRule(path="head", compute="float32", reduce="bfloat16")


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [(WIDE, "float32"), ("mixed_bfloat16", "bfloat16"), ("float32", "float32")],
)
def test_the_policy_command_says_it(policy, dtype, capsys):
    assert main(["policy", policy]) == 0
    (line,) = re.findall("gradients summed.*", capsys.readouterr().out)
    assert line.split()[-1] == dtype


def test_a_checkpoint_of_another_reduce_dtype_is_named(tmp_path):
    def state(policy):
        return jaxmp.TrainState.create(
            apply_fn=None, params=jnp.ones(4), tx=optax.sgd(0.1), policy=policy
        )

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(WIDE), policy=WIDE)
    with Checkpoints(tmp_path) as checkpoints:
        plain = "mixed_bfloat16"
        with pytest.raises(CheckpointPolicyMismatch, match=r"reduce=float32"):
            checkpoints.restore(state(plain), policy=plain)
        restored = checkpoints.restore(state(plain), policy=plain, convert=True)
    assert restored.policy == get_policy(plain)
