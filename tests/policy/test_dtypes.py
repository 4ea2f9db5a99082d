"""Names of dtypes, what a device is good at, and the algorithm of matmuls."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import PolicyError
from jaxmp.policy import Policy, get_policy, half_dtype
from jaxmp.policy._matmul_precision import precision_names
from jaxmp.policy.dtypes import dtype_to_names, name_to_dtype, policy_name_for

# "auto"

DEVICES = [
    # platform, compute capability, policy
    ("tpu", None, "mixed_bfloat16"),
    ("gpu", "12.0", "mixed_bfloat16"),  # Blackwell
    ("gpu", "10.0", "mixed_bfloat16"),
    ("gpu", "9.0", "mixed_bfloat16"),  # Hopper
    ("cuda", "8.9", "mixed_bfloat16"),  # Ada
    ("gpu", "8.0", "mixed_bfloat16"),  # Ampere
    ("gpu", "7.5", "mixed_float16"),  # Turing
    ("cuda", "7.0", "mixed_float16"),  # Volta
    ("gpu", "6.1", "float32"),  # Pascal, float16 at 1/64 of the rate
    ("gpu", "5.2", "float32"),
    ("rocm", "gfx90a", "mixed_bfloat16"),  # MI200
    ("gpu", "gfx942", "mixed_bfloat16"),  # MI300
    ("gpu", "gfx950", "mixed_bfloat16"),
    ("gpu", "gfx1100", "mixed_bfloat16"),  # RDNA 3
    ("gpu", "gfx1201", "mixed_bfloat16"),
    ("rocm", "gfx906", "mixed_float16"),
    ("gpu", "gfx1030", "mixed_float16"),  # RDNA 2
    ("cpu", None, "float32"),
    ("METAL", None, "float32"),
    ("gpu", None, "float32"),
    ("gpu", "", "float32"),
    ("gpu", "unknown", "float32"),
]


def fake_device(platform, capability):
    known = {} if capability is None else {"compute_capability": capability}
    return SimpleNamespace(platform=platform, **known)


@pytest.mark.parametrize(("platform", "capability", "name"), DEVICES)
def test_auto_picks_what_the_device_multiplies_fastest(platform, capability, name):
    device = fake_device(platform, capability)
    assert policy_name_for(device) == name
    assert get_policy("auto", device=device) == get_policy(name)
    changed = get_policy(" auto , o = bf16, matmul=tf32", device=device)
    assert changed.compute_dtype == get_policy(name).compute_dtype
    assert changed.output_dtype == jnp.bfloat16
    assert changed.matmul_precision == "tensorfloat32"


def test_auto_asks_the_first_local_device(monkeypatch):
    assert get_policy("auto", device=jax.devices("cpu")[0]) == get_policy("float32")
    assert get_policy("auto") == get_policy("auto", device=jax.local_devices()[0])
    for platform, capability, name in DEVICES:
        first = fake_device(platform, capability)
        monkeypatch.setattr(jax, "local_devices", lambda first=first: [first, None])
        assert get_policy("auto") == get_policy(name)


def test_a_device_changes_nothing_but_auto():
    device = fake_device("gpu", "9.0")
    for spec in (
        "float32",
        "c=f16",
        "16-mixed",
        np.float16,
        Policy("f32", "f16", "f32"),
    ):
        assert get_policy(spec, device=device) == get_policy(spec)


def test_half_follows_the_platform_as_in_jmp(monkeypatch):
    assert half_dtype() == jnp.float16
    monkeypatch.setattr(jax, "local_devices", lambda: [fake_device("tpu", None)])
    assert half_dtype() == jnp.bfloat16
    assert get_policy("c=half") == get_policy("c=bf16")


# Names


def test_the_two_tables_of_names_are_inverse():
    assert {
        (name, jnp.dtype(dtype))
        for dtype, names in dtype_to_names.items()
        for name in names
    } == {(name, jnp.dtype(dtype)) for name, dtype in name_to_dtype.items()}


@pytest.mark.parametrize("dtype", dtype_to_names, ids=lambda dtype: dtype.__name__)
def test_the_name_of_numpy_is_among_those_of_a_dtype(dtype):
    assert jnp.dtype(dtype).name in dtype_to_names[dtype]


@pytest.mark.parametrize("name", name_to_dtype)
def test_every_name_is_read_wherever_a_dtype_is(name):
    dtype = name_to_dtype[name]
    assert get_policy(f"p={name},c=f32").param_dtype == dtype
    assert get_policy(f"o={name}").output_dtype == dtype
    if jnp.dtype(dtype).itemsize > 1:
        every = Policy(dtype, dtype, dtype)
        assert get_policy(name) == every == Policy(name, name, name)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("spec", ["{}", "c={}", "p={}", "mixed_bfloat16,compute={}"])
def test_nothing_is_computed_in_float8_without_a_scale(spec, name):
    with pytest.raises(PolicyError, match=f"compute_dtype={name} .*'mixed_fp8'"):
        get_policy(spec.format(name))
    with pytest.raises(PolicyError, match="'mixed_fp8'"):
        Policy("float32", name, "float32")
    with pytest.raises(PolicyError, match="'mixed_fp8'"):
        get_policy(name_to_dtype[name])


# Matmul precision

HIGH, HIGHEST = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
TF32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32

PRECISIONS = [
    # written as, kept as, what dot_general gets
    ("tf32", "tensorfloat32", HIGH),
    ("tensorfloat32", "tensorfloat32", HIGH),
    ("high", "high", HIGH),
    (HIGH, "high", HIGH),
    (HIGHEST, "highest", HIGHEST),
    ("f32", "float32", HIGHEST),
    ("bf16", "bfloat16", jax.lax.Precision.DEFAULT),
    ("bfloat16_3x", "bfloat16_3x", HIGH),
    ("TF32_TF32_F32", "TF32_TF32_F32", TF32),
    (TF32, "TF32_TF32_F32", TF32),
]


@pytest.mark.parametrize(("written", "kept", "lax"), PRECISIONS)
def test_a_matmul_precision_is_kept_by_name(written, kept, lax):
    policy = Policy("f32", "bf16", "f32", matmul_precision=written)
    assert policy.matmul_precision == kept
    assert policy.lax_precision == lax
    assert get_policy(str(policy)) == policy
    assert policy != get_policy("c=bf16,o=f32")
    assert policy.with_output_dtype("f16").matmul_precision == kept


@pytest.mark.parametrize("name", precision_names())
def test_jax_takes_every_precision(name):
    policy = get_policy(f"float32,matmul={name}")
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.dot(x, x, precision=policy.lax_precision))(
        jnp.ones((2, 2))
    )
    assert "dot_general" in str(jaxpr)


@pytest.mark.parametrize("name", ["default", "high", "highest", "tf32", "float32"])
def test_jaxs_own_names_mean_what_they_mean_to_jax(name):
    of_jax = {"tf32": "tensorfloat32"}.get(name, name)

    def jaxpr(precision):
        # Two new functions: JAX's trace cache does not look at the context.
        return str(jax.make_jaxpr(lambda x: jax.lax.dot(x, x, precision=precision))(x))

    x = jnp.ones((2, 2))
    with jax.default_matmul_precision(of_jax):
        expected = jaxpr(None)
    assert jaxpr(get_policy(f"float32,matmul={name}").lax_precision) == expected


def test_no_matmul_precision_leaves_jax_its_default():
    assert get_policy("float32").matmul_precision is None
    assert get_policy("float32").lax_precision is None


def test_a_matmul_precision_changes_no_dtype(strict):
    policy = get_policy("mixed_bfloat16,matmul=tf32")
    x = jnp.ones(2)
    assert policy.cast_to_compute(x).dtype == jnp.bfloat16
    assert policy.cast_to_param(x).dtype == jnp.float32
