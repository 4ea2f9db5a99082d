"""`get_policy`: what it reads, that it reads what it writes, and nothing else."""

import copy
import pickle

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmp
from jaxmp.errors import PolicyError
from jaxmp.policy import Policy, get_policy
from jaxmp.policy._grammar import PRESETS
from jaxmp.policy._matmul_precision import precision_names
from jaxmp.policy.dtypes import dtype_to_names
from jaxmp.policy.quantize import RECIPES

# Policies, and the strings that name them

HALF = (jnp.bfloat16, jnp.float16)
FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
dtypes = st.sampled_from(list(dtype_to_names))
wide = st.sampled_from([d for d in dtype_to_names if d not in FLOAT8])
precisions = st.none() | st.sampled_from(precision_names())


@st.composite
def made_of_fields(draw):
    compute = draw(wide)
    formats = st.none() | st.sampled_from(RECIPES) if compute in HALF else st.none()
    options = {"matmul_precision": draw(precisions), "quantize": draw(formats)}
    return Policy(draw(dtypes), compute, draw(dtypes), **options)


policies = made_of_fields()

spaces = st.text(" \t", max_size=2)
KEYS = {
    "param_dtype": ("p", "params"),
    "compute_dtype": ("c", "compute"),
    "output_dtype": ("o", "output"),
}


@st.composite
def specs(draw):
    """A valid policy string in any order and spacing, and the policy that it names.

    What is left out is filled in as jmp does it: params float32, compute as params,
    output as compute.
    """
    parts, named = [], {}
    fields = draw(st.lists(st.sampled_from(list(KEYS)), unique=True))
    # Nothing is computed in float8, which params would hand on to compute.
    computes = "compute_dtype" if "compute_dtype" in fields else "param_dtype"
    for field in fields:
        named[field] = draw(wide if field == computes else dtypes)
        name = draw(st.sampled_from(dtype_to_names[named[field]]))
        parts.append((draw(st.sampled_from(KEYS[field])), name))
    precision = draw(precisions if parts else st.sampled_from(precision_names()))
    if precision is not None:
        parts.append(("matmul", precision))
    texts = [
        draw(spaces) + key + draw(spaces) + "=" + draw(spaces) + name + draw(spaces)
        for key, name in draw(st.permutations(parts))
    ]
    param = named.get("param_dtype", "float32")
    compute = named.get("compute_dtype", param)
    output = named.get("output_dtype", compute)
    return ",".join(texts), Policy(param, compute, output, matmul_precision=precision)


# Text of the grammar's own pieces gets further into the parser than arbitrary text.
pieces = ("p", "c", "o", "params", "compute", "output", "matmul", "=", ",", " ", "")
words = (
    *("half", "f32", "bf16", "auto", "mixed_float16", "tf32", "f", "16", "é", "\n"),
    *("quantize", "fp8", "fp8:mx", "mixed_fp8:mx", "float8_e4m3fn"),
)
texts = st.text() | st.lists(st.sampled_from(pieces + words)).map("".join)

# What is read

bf16, f16, f32, f64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64
f8 = jnp.float8_e4m3fn

READ = {
    # jmp
    "params=float32,compute=bfloat16,output=float32": (f32, bf16, f32),
    "p=f32,c=bf16,o=f32": (f32, bf16, f32),
    "c=f16": (f32, f16, f16),
    "p=f16,c=f16": (f16, f16, f16),
    "p=f16,c=bf16": (f16, bf16, bf16),
    "o=f16": (f32, f32, f16),
    "p=bf16": (bf16, bf16, bf16),
    "full": (f32, f32, f32),
    "half": (f16, f16, f16),
    # with spaces, in any order
    "output = f32 , compute = bf16": (f32, bf16, f32),
    " bf16 ": (bf16, bf16, bf16),
    # Keras
    "mixed_bfloat16": (f32, bf16, f32),
    "mixed_float16": (f32, f16, f32),
    "float16": (f16, f16, f16),
    "bfloat16": (bf16, bf16, bf16),
    "float32": (f32, f32, f32),
    "float64": (f64, f64, f64),
    # Lightning
    "bf16-mixed": (f32, bf16, f32),
    "16-mixed": (f32, f16, f32),
    "32-true": (f32, f32, f32),
    "64-true": (f64, f64, f64),
    "bf16-true": (bf16, bf16, bf16),
    "16-true": (f16, f16, f16),
    # Transformers
    "fp16": (f16, f16, f16),
    "bf16": (bf16, bf16, bf16),
    # a name, and what is different from it
    "mixed_bfloat16,o=bf16": (f32, bf16, bf16),
    "32-true, o=float8_e4m3fn": (f32, f32, f8),
    # multiplied in a smaller format
    **{f"mixed_{name}": (f32, bf16, f32) for name in RECIPES},
}


@pytest.mark.parametrize(("spec", "dtypes"), READ.items())
def test_reads(spec, dtypes):
    policy = get_policy(spec)
    assert (policy.param_dtype, policy.compute_dtype, policy.output_dtype) == dtypes
    assert policy.matmul_precision is None
    assert get_policy(str(policy)) == policy


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_case_above(name):
    assert name in READ


@pytest.mark.parametrize("dtype", [bf16, np.float32, np.dtype("float16"), f64])
def test_a_dtype_stands_for_all_three(dtype):
    assert get_policy(dtype) == Policy(dtype, dtype, dtype)


def test_names_its_dtypes_as_jmp_does():
    assert str(get_policy("mixed_bfloat16")) == str(jmp.get_policy("c=bf16,o=full"))


@given(policies)
def test_reads_what_it_writes(policy):
    again = get_policy(str(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == str(policy)


@given(specs())
def test_reads_parts_in_any_order_and_spacing(spec_and_policy):
    spec, policy = spec_and_policy
    assert get_policy(spec) == policy


@given(texts)
@settings(max_examples=300)
def test_raises_nothing_but_policy_errors(text):
    try:
        policy = get_policy(text)
    except PolicyError as error:
        message = str(error)
    else:
        assert get_policy(str(policy)) == policy
        return
    assert repr(text) in message


@pytest.mark.parametrize(
    "spec",
    [
        *(
            None,
            3,
            1.5,
            b"f32",
            pytest.param(object(), id="object"),
            [],
            {},
            {"names": 1},
            ("f32",),
            int,
            type,
        ),
        *(np.generic, np.floating, np.int8, np.dtype([("a", "f4")]), jnp.complex64),
        *(jax.random.key(0).dtype, jnp.ones(2), np.float32(1), jnp.float8_e4m3b11fnuz),
        *(jmp.Policy("nonsense", f32, f32), type("Fake", (), {"dtype": "nonsense"})),
    ],
    ids=repr,
)
def test_what_is_no_policy_is_a_policy_error(spec):
    with pytest.raises(PolicyError, match=r"mixed_bfloat16|full, f32, float32"):
        get_policy(spec)


def test_a_foreign_byte_order_is_made_native():
    swapped = np.dtype("float32").newbyteorder()
    policy = get_policy(swapped)
    assert policy.param_dtype == np.float32 != swapped
    assert get_policy(str(policy)) == policy


# Errors: the spec, carets under the part that is wrong, and what may stand there

WRONG = [
    # spec, what carets are under, the words of the problem, what is allowed
    ("compute_float16", "compute_float16", "Unknown dtype or policy name", "auto"),
    ("", "", "Unknown dtype or policy name ''", "Allowed here: auto"),
    ("mixed_float61", "mixed_float61", "Did you mean 'mixed_float16'?", "16-mixed"),
    ("p=f32,c=bf17", "bf17", "Unknown dtype 'bf17'", "bf16, bfloat16, f16"),
    ("p=f32,c=bf17", "bf17", "Did you mean 'bf16'?", "float8_e5m2"),
    ("p=f32, c = int8 ", "int8", "Unknown dtype 'int8'", "half"),
    ("p=f32,c=", "", "Unknown dtype ''", "half"),
    ("p=f32,comptue=bf16", "comptue", "Unknown key 'comptue'", "compute (c)"),
    ("p=f32,comptue=bf16", "comptue", "Did you mean 'compute'?", "matmul"),
    ("p=f32,bf16", "bf16", "Expected key=value", "p=f32,c=bf16,o=f32"),
    ("p=f32,", "", "Expected key=value", "params (p)"),
    ("p=f32,params=f16", "params=f16", "param_dtype is given twice", ""),
    ("c=f16,matmul=tf33", "tf33", "Unknown matmul precision", "TF32_TF32_F32"),
    ("c=f16,matmul=tf33", "tf33", "Did you mean 'tf32'?", "highest"),
    ("mixed_bfloat16,c=f16,=", "=", "Unknown key ''", "output (o)"),
    ("c=bf16,quantize=fp9", "fp9", "Unknown format 'fp9'", "int8:wgrad_half, none"),
    ("c=bf16,quantize=FP8", "FP8", "Did you mean 'fp8'?", "fp8:rowwise"),
    ("c=bf16,quantise=fp8", "quantise", "Did you mean 'quantize'?", "matmul"),
]


@pytest.mark.parametrize(("spec", "part", "problem", "allowed"), WRONG)
def test_an_error_points_at_the_part_that_is_wrong(spec, part, problem, allowed):
    with pytest.raises(PolicyError) as caught:
        get_policy(spec)
    message = str(caught.value)
    assert problem in message
    assert allowed in message
    assert repr(spec) in message
    _, quoted, carets, *_ = message.splitlines()
    assert quoted.strip() == spec.strip()
    assert set(carets.strip()) == {"^"}
    start, end = carets.index("^"), carets.rindex("^") + 1
    assert quoted[start:end].strip() == part


def test_an_unprintable_spec_is_quoted_without_carets():
    with pytest.raises(PolicyError, match=r"'bf16\\n\\x00'") as caught:
        get_policy("bf16\n\0")
    assert "^" not in str(caught.value)


@pytest.mark.parametrize("field", ["param_dtype", "compute_dtype", "output_dtype"])
def test_a_wrong_dtype_names_its_field(field):
    fields = {"param_dtype": f32, "compute_dtype": f32, "output_dtype": f32}
    with pytest.raises(PolicyError, match=rf"'int7' as {field} .*bfloat16"):
        Policy(**{**fields, field: "int7"})


def test_a_wrong_precision_lists_the_right_ones():
    with pytest.raises(PolicyError, match=r"'fast'.*tf32.*BF16_BF16_F32_X3"):
        Policy(f32, f32, f32, matmul_precision="fast")


# A policy is a value


@given(policies)
@settings(max_examples=30)
def test_a_policy_is_a_value(policy):
    for same in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert same == policy
        assert hash(same) == hash(policy)
    (leaf,), _ = jax.tree.flatten(policy)
    assert leaf is policy
    with pytest.raises(AttributeError):
        policy.param_dtype = f32


@given(policies, dtypes)
@settings(max_examples=30)
def test_with_output_dtype_changes_the_output_only(policy, dtype):
    changed = policy.with_output_dtype(dtype)
    assert type(changed) is Policy
    assert changed.output_dtype == dtype
    assert changed.matmul_precision == policy.matmul_precision
    assert changed.quantize == policy.quantize
    assert changed.with_output_dtype(policy.output_dtype) == policy


def test_everyday_names_are_those_of_the_subpackage():
    assert jaxmp.get_policy is get_policy
    assert jaxmp.Policy is Policy


SUGGESTED = {
    "mixed_float16": (
        "float16_mixed FLOAT16_MIXED float16-mixed fp16_mixed fp16-mixed f16_mixed "
        "mixed_fp16 Mixed_Float16 MIXED_FLOAT16 mixed-float16 half_mixed 16_mixed "
        "16-Mixed amp AMP O1 O2 amp_fp16 mixed_half mixed_16 float16_amp mixed_f16"
    ),
    "mixed_bfloat16": (
        "bfloat16_mixed bf16_mixed BF16-MIXED Mixed_BFloat16 mixed-bf16 mixed_bf16 "
        "bfloat16-mixed bf16_amp mixed mixed_precision mixed_bfloat61"
    ),
    "mixed_float16', which keeps float32 parameters, or 'float16": "FLOAT16 Float16",
    "mixed_float16', which keeps float32 parameters, or 'fp16": "FP16",
    "mixed_bfloat16', which keeps float32 parameters, or 'bfloat16": "BFLOAT16",
    "mixed_bfloat16', which keeps float32 parameters, or 'bf16": "BF16",
    "float32": "FLOAT32 Float32 float23 single 32",
    "float64": "double Float64",
    "bf16-true": "bf16_true BF16-TRUE pure_bf16 bfloat16_pure",
    "16-true": "pure_fp16 16_true float16_true fp16_only",
    "float32,matmul=tf32": "tf32 TF32",
    "auto": "AUTO Auto",
    "mixed_fp8": (
        "fp8 FP8 float8 f8 mixed_float8 MIXED_FP8 mixed-fp8 fp8_mixed fp8-mixed "
        "mixed_f8 mixed_e4m3 float8_mixed"
    ),
    "mixed_fp8:hybrid": "fp8:hybrid mixed_fp8_hybrid",
    "mixed_fp8:rowwise": "mixed_fp8:row fp8_rowwise",
    "mixed_int8": "int8 INT8 mixed_i8 int8_mixed mixed-int8",
}


@pytest.mark.parametrize(
    ("text", "meant"),
    [(text, meant) for meant, texts in SUGGESTED.items() for text in texts.split()],
)
def test_a_misspelt_name_suggests_what_was_most_likely_meant(text, meant):
    with pytest.raises(PolicyError) as error:
        get_policy(text)
    assert f"Did you mean '{meant}'" in str(error.value)
    get_policy(meant.split("'")[0])


def test_values_are_suggested_in_any_case():
    for spec, meant in (("p=F32", "f32"), ("c=BFloat16", "bfloat16"), ("P=f32", "p")):
        with pytest.raises(PolicyError, match=f"Did you mean '{meant}'"):
            get_policy(spec)


@pytest.mark.parametrize(
    "scale",
    [
        jmp.DynamicLossScale(jnp.float32(2.0**15)),
        jmp.StaticLossScale(8.0),
        jaxmp.NoOpLossScale(),
    ],
)
def test_a_loss_scale_in_place_of_a_policy_is_told_where_it_belongs(scale):
    with pytest.raises(
        PolicyError, match=r"LossScale\(\.\.\.\) is a loss scale"
    ) as told:
        get_policy(scale)
    assert "jaxmp.loss_scaling(optimizer, scale)" in str(told.value)
