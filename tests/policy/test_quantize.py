"""The formats of a policy's matmuls: read, written, compared, refused, and shown."""

import copy
import dataclasses
import pickle
import re
from types import SimpleNamespace

import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import CheckpointPolicyMismatch, InvalidRule, PolicyError
from jaxmp.policy import Policy, get_policy
from jaxmp.policy.quantize import RECIPES
from jaxmp.policy.rule_sets import first_match, first_quantization
from jaxmp.training import Checkpoints

RESERVED = {"fp8:mx": "MXFP8", "fp8:block": "blocks of 128 numbers"}


def policy_of(name, compute="bfloat16"):
    return Policy("float32", compute, "float32", quantize=name)


# Read and written


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_is_mixed_bfloat16_in_a_smaller_format(name):
    policy = get_policy(f"mixed_{name}")
    assert policy == policy_of(name) == get_policy(f"mixed_bfloat16,quantize={name}")
    assert dataclasses.replace(policy, quantize=None) == get_policy("mixed_bfloat16")
    assert str(policy) == f"p=full,c=bf16,o=full,quantize={name}"


TEXTS = [
    *(f"mixed_{name}" for name in RECIPES),
    "mixed_fp8,c=f16",
    "p=f32,c=f16,quantize=int8:wgrad_half",
    "quantize = fp8:rowwise , c = bf16",
    "mixed_fp8:hybrid,reduce=float32,matmul=tf32",
    "bf16-true,quantize=fp8",
    "p=float8_e4m3fn,c=bf16,o=float8_e5m2,quantize=fp8",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_policy_reads_what_it_writes_and_is_a_value(text):
    policy = get_policy(text)
    assert policy.quantize in RECIPES
    copies = (
        get_policy(str(policy)),
        copy.deepcopy(policy),
        pickle.loads(pickle.dumps(policy)),
        dataclasses.replace(policy),
    )
    for same in copies:
        assert same == policy
        assert hash(same) == hash(policy)
        assert same.quantize == policy.quantize


def test_it_is_part_of_the_value():
    policies = {policy_of(name) for name in (*RECIPES, None)}
    assert len(policies) == len(RECIPES) + 1
    by_jmp = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    assert policy_of(None) == by_jmp
    assert policy_of("fp8") != by_jmp
    assert by_jmp != policy_of("fp8")


@pytest.mark.parametrize("name", RECIPES)
def test_what_changes_the_rest_of_a_policy_keeps_it(name):
    policy = policy_of(name)
    assert policy.with_output_dtype("bfloat16").quantize == name
    assert dataclasses.replace(policy, compute_dtype="float16").quantize == name
    assert get_policy(policy) is policy


def test_the_casts_are_those_of_the_dtypes():
    policy, x = get_policy("mixed_fp8"), jnp.ones(2)
    assert policy.cast_to_compute(x).dtype == jnp.bfloat16
    assert policy.cast_to_param(x).dtype == policy.cast_to_output(x).dtype == x.dtype


def test_the_last_part_decides():
    assert get_policy("mixed_fp8,quantize=int8") == get_policy("mixed_int8")
    assert get_policy("mixed_fp8,quantize=none") == get_policy("mixed_bfloat16")
    assert get_policy("mixed_fp8,c=f16").compute_dtype == jnp.float16


@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32", "float64"])
def test_none_is_no_format_whatever_is_computed_in(compute):
    assert policy_of("none", compute).quantize is None
    assert policy_of("none", compute) == policy_of(None, compute)
    assert "quantize" not in str(get_policy(f"c={compute},quantize=none"))


@pytest.mark.parametrize("capability", ["12.0", "10.0", "9.0", "8.9", "8.0", "7.5"])
def test_auto_never_chooses_one(capability):
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    for device in (gpu, SimpleNamespace(platform="tpu")):
        assert get_policy("auto", device=device).quantize is None
        # Who asks for one beside it gets it.
        assert get_policy("auto,quantize=fp8", device=device).quantize == "fp8"


# Refused


@pytest.mark.parametrize("name", RESERVED)
def test_a_reserved_name_says_for_what(name):
    texts = f"mixed_{name}", f"c=bf16,quantize={name}", f"mixed_fp8,quantize={name}"
    makers = [lambda text=text: get_policy(text) for text in texts]
    makers.append(lambda: policy_of(name))
    makers.append(lambda: jaxmp.PolicyRule(path="x", quantize=name))
    makers.append(lambda: jaxmp.casting.OpRule(path="x", quantize=name))
    for make in makers:
        with pytest.raises(PolicyError) as caught:
            make()
        for word in (f"quantize={name!r}", RESERVED[name], *RECIPES):
            assert word in str(caught.value)


STRANGE = [b"fp8", 8, True, ["fp8"], {}, np.ones(2), jnp.float8_e4m3fn, RECIPES]
MISSPELT = ["", "fp9", "FP8", "mixed_fp8", "fp8:", "int8:rowwise", "float8_e4m3fn"]


@pytest.mark.parametrize("name", [*MISSPELT, *STRANGE], ids=repr)
def test_an_unknown_name_lists_the_right_ones(name):
    with pytest.raises(PolicyError, match="Unknown quantize") as caught:
        policy_of(name)
    for word in (repr(name), *RECIPES, "none"):
        assert word in str(caught.value)


@pytest.mark.parametrize("spec", ["mixed_fp9", "mixed_fp8:", "mixed_none", "fp8:mxx"])
def test_an_unknown_preset_lists_the_right_ones(spec):
    with pytest.raises(PolicyError, match="Unknown dtype or policy name") as caught:
        get_policy(spec)
    assert "mixed_fp8:rowwise" in str(caught.value)


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("name", RECIPES)
def test_only_matmuls_in_half_have_a_smaller_format(name, compute):
    words = f"quantize='{name}'.*compute_dtype={compute}.*compute=bfloat16"
    for make in (
        lambda: policy_of(name, compute),
        lambda: get_policy(f"c={compute},quantize={name}"),
        lambda: get_policy(f"mixed_{name},c={compute}"),
        lambda: dataclasses.replace(policy_of(name), compute_dtype=compute),
    ):
        with pytest.raises(PolicyError, match=words):
            make()


# Rules


@pytest.mark.parametrize("name", [*RECIPES, "none"])
def test_a_rule_has_one_too(name):
    rule = jaxmp.PolicyRule(path="head", quantize=name)
    assert rule.quantize == name
    assert str(rule) == f"PolicyRule(path='head', quantize='{name}')"
    assert rule == jaxmp.PolicyRule(path="head", quantize=name)
    half = jaxmp.PolicyRule(path="head", compute="bfloat16", quantize=name)
    assert half.compute == jnp.bfloat16


def test_a_rule_is_checked_alike():
    with pytest.raises(InvalidRule, match=r"quantize='fp9'.*fp8:hybrid.*none"):
        jaxmp.PolicyRule(path="head", quantize="fp9")
    with pytest.raises(InvalidRule, match=r"in float32 and in fp8.*Leave one"):
        jaxmp.PolicyRule(path="head", compute="float32", quantize="fp8")
    with pytest.raises(PolicyError, match=r"compute_dtype=float8_e5m2.*mixed_fp8"):
        jaxmp.PolicyRule(path="head", compute="float8_e5m2")
    with pytest.raises(InvalidRule, match="does not say which layers"):
        jaxmp.PolicyRule(quantize="fp8")


def test_the_first_rule_with_a_format_or_a_compute_dtype_decides():
    rules = (
        jaxmp.PolicyRule(path="a", reduce="float32"),
        jaxmp.PolicyRule(path="a", quantize="int8"),
        jaxmp.PolicyRule(path="a|b", compute="bfloat16"),
        jaxmp.PolicyRule(path="a|b", quantize="fp8"),
    )

    def deciding(path):
        return first_quantization(rules, path, None, None)

    assert deciding("a") is rules[1]
    assert deciding("b") is rules[2]
    assert deciding("c") is None
    # A rule with a format alone leaves the dtypes to others.
    assert first_match(rules, "a", None, None) is rules[2]


# What a policy is for


@pytest.mark.parametrize("name", RECIPES)
def test_a_loss_scale_follows_the_compute_dtype(name):
    params = jnp.ones(2)

    def scales(policy):
        """Before and after a step whose gradients overflow."""
        tx = jaxmp.loss_scaling(optax.sgd(0.1), policy)
        before = tx.init(params)
        _, after = tx.update(params * jnp.inf, before, params)
        return [float(jaxmp.get_loss_scale(state)) for state in (before, after)]

    assert scales(f"mixed_{name}") == [1, 1]
    first, second = scales(f"p=f32,c=f16,quantize={name}")
    assert first == 2 * second > 1
    assert [first, second] == scales("p=f32,c=f16")


@pytest.mark.parametrize("name", RECIPES)
def test_the_policy_command_shows_it(name, capsys):
    assert main(["policy", f"mixed_{name}"]) == 0
    (line,) = re.findall("written out.*", capsys.readouterr().out)
    assert line.endswith(f"quantize={name}")


def test_a_checkpoint_of_another_format_is_named(tmp_path):
    def state(policy):
        return jaxmp.TrainState.create(
            apply_fn=None, params=jnp.ones(4), tx=optax.sgd(0.1), policy=policy
        )

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state("mixed_fp8"), policy="mixed_fp8")
    with Checkpoints(tmp_path) as checkpoints:
        plain = "mixed_bfloat16"
        with pytest.raises(CheckpointPolicyMismatch, match="quantize=fp8"):
            checkpoints.restore(state(plain), policy=plain)
        restored = checkpoints.restore(state(plain), policy=plain, convert=True)
    assert restored.policy == get_policy(plain)
