"""Gradients are summed in the dtype asked for, and never in unscaled float16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import GradientsAlreadySummed, ReduceDtypeError, UnknownAxis
from jaxmp.sharding import reduce_gradients, replicated
from jaxmp.testing import equations

pytestmark = pytest.mark.devices(8)

CHECKS = pytest.mark.parametrize("check_vma", [True, False])


@functools.cache
def mesh(shape=(8,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def reduced(axes="data", check_vma=True, devices=None, **options):
    return jax.shard_map(
        lambda grads: reduce_gradients(grads, axes, **options),
        mesh=devices or mesh(),
        in_specs=(P(axes),),
        out_specs=P(),
        check_vma=check_vma,
    )


@CHECKS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.bfloat16])
@pytest.mark.parametrize("grads_dtype", ["float32", "float16", "bfloat16"])
def test_what_travels_has_the_dtype_asked_for(check_vma, dtype, grads_dtype):
    grads = jnp.arange(32, dtype=grads_dtype).reshape(8, 4)
    fn = reduced(dtype=dtype, check_vma=check_vma)
    sent = [
        eqn.invars[0].aval.dtype
        for _, eqn in equations(jax.make_jaxpr(fn)(grads))
        if eqn.primitive.name.startswith("psum")
    ]
    assert sent == [jnp.dtype(dtype)]
    found = jax.jit(fn)(grads)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], grads.astype(jnp.float32).mean(0), rtol=2e-2)


@CHECKS
def test_a_mean_is_divided_before_it_is_summed(check_vma):
    grads = {"w": jnp.full((8, 2), 3e38, jnp.float32)}
    mean = jax.jit(reduced(check_vma=check_vma))(grads)["w"]
    np.testing.assert_allclose(mean, np.full((1, 2), 3e38), rtol=1e-6)
    total = jax.jit(reduced(check_vma=check_vma, mean=False))(grads)["w"]
    assert bool(jnp.all(jnp.isinf(total)))


def test_a_mean_over_a_number_that_is_no_power_of_two_is_rounded_once():
    devices = jax.make_mesh(
        (3,), ("data",), devices=jax.devices()[:3], axis_types=(AxisType.Auto,)
    )
    grads = jnp.ones((3, 1))
    found = jax.jit(reduced(devices=devices))(grads)
    np.testing.assert_allclose(found, np.ones((1, 1)), rtol=2e-7)


@CHECKS
def test_several_axes_are_reduced_together(check_vma):
    grads = jnp.arange(8.0)
    devices = mesh((4, 2), ("a", "b"))
    fn = reduced(("a", "b"), check_vma, devices=devices, dtype="bfloat16")
    np.testing.assert_array_equal(jax.jit(fn)(grads), [3.5])


def test_one_axis_of_two_is_reduced_alone():
    devices = mesh((4, 2), ("a", "b"))
    fn = jax.shard_map(
        lambda grads: reduce_gradients(grads, "a"),
        mesh=devices,
        in_specs=(P(("a", "b")),),
        out_specs=P("b"),
    )
    np.testing.assert_array_equal(jax.jit(fn)(jnp.arange(8.0)), [3.0, 4.0])


def test_what_has_no_gradient_passes():
    float0 = np.zeros(3, jax.dtypes.float0)
    tree = {"float0": float0, "n": np.int32(3), "none": None, "flag": True}

    def fn(x, z):
        found = reduce_gradients({**tree, "x": x, "z": z}, "data")
        assert found["float0"] is float0
        assert found["n"] is tree["n"]
        assert found["none"] is None
        assert found["flag"] is True
        return found["x"], found["z"]

    x, z = jax.shard_map(
        fn, mesh=mesh(), in_specs=(P("data"), P("data")), out_specs=(P(), P())
    )(jnp.ones(8), jnp.full(8, 2j))
    assert (x.dtype, z.dtype) == (jnp.float32, jnp.complex64)
    assert complex(z[0]) == 2j


def test_float64_keeps_its_dtype():
    with jax.enable_x64(True):
        grads = jnp.arange(8.0) + 2.0**-40
        found = jax.jit(reduced())(grads)
        assert found.dtype == jnp.float64
        assert float(found[0]) == 3.5 + 2.0**-40


def test_vmap_binds_an_axis_as_well():
    found = jax.vmap(lambda g: reduce_gradients(g, "n"), axis_name="n")(jnp.arange(4.0))
    np.testing.assert_array_equal(found, np.full(4, 1.5))


@pytest.mark.skipif(not hasattr(jax, "pmap"), reason="this JAX has no pmap")
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap_binds_an_axis_as_well():
    fn = jax.pmap(lambda g: reduce_gradients(g, "n", dtype="bfloat16"), axis_name="n")
    np.testing.assert_array_equal(fn(jnp.arange(8.0)), np.full(8, 3.5))


# float16


@CHECKS
def test_float16_travels_scaled(check_vma):
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")
    state = tx.init(jnp.ones(2))
    grads = jnp.full((8, 2), 1e-8)  # zero in float16, and 6.6e-4 under the scale
    for scale in (state, 2.0**16, jnp.float32(2**16)):
        fn = reduced(check_vma=check_vma, dtype="float16", loss_scale=scale)
        np.testing.assert_allclose(jax.jit(fn)(grads), np.full((1, 2), 1e-8), rtol=2e-3)


def test_a_scaled_float16_sum_that_overflows_is_infinite():
    fn = reduced(dtype="float16", loss_scale=2.0**16)
    assert bool(jnp.isinf(jax.jit(fn)(jnp.full(8, 10.0))[0]))


def test_unscaled_float16_is_refused():
    with pytest.raises(ReduceDtypeError, match=r"without a loss scale.*loss_sc"):
        reduced(dtype="float16")(jnp.ones(8))


@pytest.mark.parametrize("dtype", ["int32", jnp.int8, "float8_e5m2", "half precision"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ReduceDtypeError, match="Use one of: float32, bfloat16"):
        reduced(dtype=dtype)(jnp.ones(8))


# Axes


@pytest.mark.parametrize("fn", [reduce_gradients, replicated])
def test_an_axis_that_nothing_binds_is_named_with_the_repair(fn):
    for call in (fn, jax.jit(fn, static_argnums=1)):
        with pytest.raises(UnknownAxis, match=r"'data'.*bound by the mesh: none"):
            call(jnp.ones(3), "data")
    with pytest.raises(UnknownAxis, match=r"'model'.*'data'\).*jax.shard_map\("):
        jax.shard_map(
            lambda x: fn(x, ("data", "model")),
            mesh=mesh(),
            in_specs=(P("data"),),
            out_specs=P("data"),
        )(jnp.ones(8))


@pytest.mark.parametrize("mean", [True, False])
def test_what_jax_has_summed_already_is_not_reduced_again(mean):
    """The mean of equal sums is the sum: eight times too large, in silence."""

    def gradient(w, x, mark):
        w = replicated(w, "data") if mark else w
        grads = jax.grad(lambda p: jnp.mean(x * p["w"]))({"w": w})
        return reduce_gradients(grads, "data", mean=mean)["w"]

    def run(mark):
        fn = functools.partial(gradient, mark=mark)
        specs = (P(), P("data"))
        return jax.shard_map(fn, mesh=mesh(), in_specs=specs, out_specs=P())(
            jnp.float32(1), jnp.ones(8)
        )

    with pytest.raises(GradientsAlreadySummed, match=r"'w'.*sharding.replicated"):
        run(mark=False)
    assert float(run(mark=True)) == (1 if mean else 8)
