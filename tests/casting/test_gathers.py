"""A weight that a program brings together on every device travels in half."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.testing import equations

pytestmark = pytest.mark.devices(8)

GATHERS = ("all_gather", "reshard", "sharding_constraint")
SCATTERS = ("reduce_scatter", "reshard", "sharding_constraint")
POLICIES = ("mixed_bfloat16", "mixed_bfloat16,reduce=float32")


def mesh_of(kind):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def constrained(w, x, mesh):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
    return jnp.tanh(x @ w).mean()


def resharded(w, x, mesh):
    return jnp.tanh(x @ jax.sharding.reshard(w, P(None, None))).mean()


def gathered(w, x, mesh):
    def local(w, x):
        w = jax.lax.all_gather(w, "data", tiled=True)
        return jax.lax.pmean(jnp.tanh(x @ w).mean(), "data")

    specs = (P("data"), P("data"))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(w, x)


WAYS = {
    "sharding_constraint": (constrained, AxisType.Auto),
    "reshard": (resharded, AxisType.Explicit),
    "all_gather": (gathered, AxisType.Auto),
}
every_way = pytest.mark.parametrize("way", WAYS)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def problem(way):
    loss, kind = WAYS[way]
    mesh = mesh_of(kind)
    rng = np.random.default_rng(0)
    sharding = NamedSharding(mesh, P("data", None))
    w, x = (
        jax.device_put(rng.normal(size=shape).astype(np.float32), sharding)
        for shape in ((16, 24), (32, 16))
    )
    return mesh, lambda w, x: loss(w, x, mesh), w, x


def live(function, *args):
    """The equations that a result depends on."""
    closed = jax.make_jaxpr(function)(*args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    return [equation for _, equation in equations(jaxpr)]


def dtypes(equations, names, shape):
    return {
        str(equation.invars[0].aval.dtype)
        for equation in equations
        if equation.primitive.name in names and equation.outvars[0].aval.shape == shape
    }


@every_policy
@every_way
def test_a_weight_is_brought_together_in_half(way, policy):
    mesh, loss, w, x = problem(way)
    with jax.set_mesh(mesh):
        found = live(jaxmp.autocast(loss, policy), w, x)
    assert dtypes(found, GATHERS, w.shape) == {"bfloat16"}


@every_policy
@every_way
def test_its_gradient_is_added_up_as_the_policy_says(way, policy):
    """By a matmul, or by the collective that an `all_gather` has for its gradient."""
    mesh, loss, w, x = problem(way)
    with jax.set_mesh(mesh):
        found = live(jax.grad(jaxmp.autocast(loss, policy)), w, x)
    shape = (2, 24) if way == "all_gather" else w.shape
    if way != "all_gather":
        found = [e for e in found if "transpose" in str(e.source_info.name_stack)]
    is_wide = way == "all_gather" or "float32" in policy
    expected = "float32" if is_wide else "bfloat16"
    assert dtypes(found, SCATTERS, shape) == {expected}


@every_policy
@every_way
def test_nothing_else_changes(way, policy):
    mesh, loss, w, x = problem(way)
    with jax.set_mesh(mesh):
        function = jax.jit(jax.value_and_grad(jaxmp.autocast(loss, policy)))
        value, grad = function(w, x)
    w, x = np.asarray(w), np.asarray(x)

    def plain(w):
        return jnp.tanh(x @ w).mean()

    wanted, wanted_grad = jax.jit(jax.value_and_grad(jaxmp.autocast(plain)))(w)
    np.testing.assert_allclose(value, wanted, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(grad, wanted_grad, rtol=0.05, atol=1e-3)
    assert grad.dtype == jnp.float32


def test_who_reads_float32_gets_float32():
    mesh, _, w, x = problem("sharding_constraint")

    def loss(w, x):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return (x @ w).mean() + jnp.sum(w**2)

    def norm(w):
        return jnp.sum(w**2)

    found = jax.jit(jaxmp.autocast(loss))(w, x * 0)
    np.testing.assert_allclose(found, jax.jit(norm)(w), rtol=1e-6)


def test_activations_on_an_explicit_mesh_stay_in_half():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("data", None)))
        w = jnp.ones((16, 16))

        def model(w, x):
            y = jax.sharding.reshard(x @ w, P(None, "data"))
            return (jax.sharding.reshard(y, P("data", None)) @ w).sum()

        found = live(jaxmp.autocast(model), w, x)
    assert dtypes(found, ("reshard",), (8, 16)) == {"bfloat16"}
    dots = [e for e in found if e.primitive.name == "dot_general"]
    assert {str(v.aval.dtype) for e in dots for v in e.invars} == {"bfloat16"}


@every_policy
@pytest.mark.parametrize("outside", [True, False])
def test_a_tied_table_on_an_explicit_mesh(policy, outside):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    ids = np.arange(32).reshape(8, 4) % 16

    def loss(table, ids, **options):
        x = jnp.tanh(table.at[ids].get(**options))
        return jnp.square(x @ table.T).mean()

    def function(loss):
        if outside:
            return jax.jit(jax.value_and_grad(jaxmp.autocast(loss, policy)))
        return jax.jit(jaxmp.autocast(jax.value_and_grad(loss), policy))

    wanted = function(loss)(table, ids)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(ids, NamedSharding(mesh, P("data", None)))
        spec = P("data", None, None)
        found = function(lambda t, i: loss(t, i, out_sharding=spec))(table, placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3),
        found,
        wanted,
    )
