"""What models say of where their parameters live survives a policy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxmp

pytestmark = pytest.mark.devices(8)

POLICIES = ("mixed_bfloat16", "mixed_bfloat16,reduce=float32")
every_policy = pytest.mark.parametrize("policy", POLICIES)
divided = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None))
logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
LOGICAL_RULES = (("in", "data"), ("out", None), ("batch", "data"))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(16, kernel_init=divided)(x), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, kernel_init=logical)(x)
        x = nn.with_logical_constraint(x, ("batch", "out"))
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return layers()(x, None)[0]


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(
            nnx.initializers.lecun_normal(), ("data", None), eager_sharding=False
        )
        self.inner = nnx.Linear(16, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.inner(x))


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield mesh


@every_policy
def test_linen_annotations_survive(mesh, policy):
    x = jnp.ones((8, 16))
    model = jaxmp.apply_policy(Model(), policy)

    def loss(variables):
        return model.apply(variables, x).astype(jnp.float32).mean()

    with nn.logical_axis_rules(LOGICAL_RULES):
        plain = nn.get_partition_spec(Model().init(jax.random.key(0), x))
        variables = model.init(jax.random.key(0), x)
        grads = jax.jit(jax.grad(loss))(variables)
    assert nn.get_partition_spec(variables) == plain
    assert nn.get_partition_spec(grads) == plain
    layers = plain["params"]["ScanCheckpointLayer_0"]["Dense_0"]
    assert layers["kernel"] == P(None, "data", None)


@every_policy
def test_nnx_annotations_survive(mesh, policy):
    model = jaxmp.apply_policy(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), policy)
    specs = nnx.get_partition_spec(nnx.state(model))
    assert specs["inner"]["kernel"].get_value() == P("data", None)

    def loss(model, x):
        return model(x).astype(jnp.float32).mean()

    model = jaxmp.apply_policy(NnxModel(nnx.Rngs(0)), policy)
    grads = nnx.jit(nnx.grad(loss))(model, jnp.ones((8, 16)))
    found = nnx.get_partition_spec(grads)
    assert found["inner"]["kernel"].get_value() == P("data", None)
