"""The names that JAX gives its primitives, and the parameters of some, one by one."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxmp._jaxpr import primitives
from jaxmp._jaxpr.flops import matmul_shape
from tests.support.equations import equation

X = jnp.ones((4, 3))
ONES, COUNTS = jnp.ones((2, 3, 5)), jnp.array([2, 2])
MADE_BY = {
    "convert_element_type": lambda: X.astype(jnp.bfloat16),
    "dot_general": lambda: X @ X.T,
    "ragged_dot_general": lambda: lax.ragged_dot(X, ONES, COUNTS),
    "conv_general_dilated": lambda: lax.conv(ONES, ONES[:, :, :1], (1,), "SAME"),
    "add": lambda: X + X,
    "sub": lambda: X - X,
    "add_any": lambda: jax.grad(lambda x: (jnp.sin(x) * jnp.cos(x)).sum())(X),
    "mul": lambda: X * X,
    "div": lambda: X / X,
    "neg": lambda: -X,
    "select_n": lambda: jnp.where(X > 0, X, X),
    "scatter-add": lambda: X.at[0].add(1.0),
    "scatter-sub": lambda: X.at[0].subtract(1.0),
    "reduce_sum": lambda: X.sum(),
    "reduce_max": lambda: X.max(),
    "reduce_min": lambda: X.min(),
    "max": lambda: jnp.maximum(X, X),
    "min": lambda: jnp.minimum(X, X),
    "clamp": lambda: lax.clamp(0.0, X, 1.0),
    "reduce_window_max": lambda: windows(-jnp.inf, lax.max),
    "reduce_window_min": lambda: windows(jnp.inf, lax.min),
    "reduce_window_sum": lambda: windows(0.0, lax.add),
    "cumsum": lambda: lax.cumsum(X),
    "reshape": lambda: X.reshape(-1),
    "squeeze": lambda: lax.squeeze(X[:1], (0,)),
    "transpose": lambda: X.T,
    "broadcast_in_dim": lambda: jnp.broadcast_to(X, (2, 4, 3)),
    "copy": lambda: jnp.copy(X),
    "name": lambda: checkpoint_name(X, "x"),
    "slice": lambda: X[:2],
    "rev": lambda: X[::-1],
    "concatenate": lambda: jnp.concatenate([X, X]),
    "pad": lambda: jnp.pad(X, 1),
    "dynamic_slice": lambda: lax.dynamic_slice(X, (COUNTS[0], 0), (1, 3)),
    "gather": lambda: X[COUNTS],
}
KNOWN = {primitives.CAST}.union(
    primitives.MATMULS,
    *(primitives.ADDS, primitives.SCALES, primitives.SUMS_INTO, primitives.REDUCES),
    *(primitives.SELECTING, primitives.LAYOUT, primitives.LINEAR),
)


def windows(start, combine):
    return lax.reduce_window(X, start, combine, (1, 2), (1, 1), "SAME")


def summed_over_devices():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": P("i"), "out_specs": P()}
    return jax.shard_map(lambda x: lax.psum(x, "i"), mesh=mesh, **specs)(X)


@pytest.mark.parametrize("name", MADE_BY)
def test_an_operation_is_a_primitive_of_this_name(name):
    assert equation(name, MADE_BY[name])
    assert name in KNOWN


def test_a_sum_over_devices_has_one_of_two_names():
    assert equation(("psum", "psum_invariant"), summed_over_devices)


def test_the_parameters_of_matmuls_and_convolutions_give_their_shape():
    batched = equation(
        primitives.MATMULS, jnp.matmul, jnp.ones((6, 4, 3)), jnp.ones((6, 3, 5))
    )
    assert matmul_shape(batched) == (6, 4, 5, 3, 1)
    ragged = equation(primitives.MATMULS, lax.ragged_dot, X, ONES, COUNTS)
    assert matmul_shape(ragged) == (1, 4, 5, 3, 1)
    grouped = equation(
        primitives.MATMULS,
        lambda x, k: lax.conv_general_dilated(
            x, k, (1, 1), [(1, 1)] * 2, lhs_dilation=(2, 2), feature_group_count=2
        ),
        jnp.ones((1, 4, 8, 8)),
        jnp.ones((6, 2, 3, 3)),
    )
    params = sorted(grouped.params)
    assert matmul_shape(grouped) == (2, 15 * 15, 3, 2, 9 // 4), params
