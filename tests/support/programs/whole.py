"""Operations that autocast binds whole, for random programs: `f(x)`, in x's shape.

They keep the size of what they read, and pass some of its gradient on.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.scipy import special

import jaxmp
from tests.support.programs.values import rows

_unknown_p = core.Primitive("jaxmp_test_unknown")
_unknown_p.def_impl(lambda x: x)
_unknown_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_unknown_p, mlir.lower_fun(lambda x: x, False))
ad.deflinear2(_unknown_p, lambda ct, x: [_unknown_p.bind(ct)])
batching.primitive_batchers[_unknown_p] = lambda args, dims: (
    _unknown_p.bind(*args),
    dims[0],
)


def _fixed(count: int) -> jax.Array:
    """A well-conditioned square matrix."""
    return jnp.eye(count) + jnp.sin(jnp.arange(count**2.0)).reshape(count, -1) / (
        2 * count
    )


def _solve(x: jax.Array) -> jax.Array:
    flat = rows(x)
    return jnp.linalg.solve(_fixed(len(flat)), flat).reshape(x.shape)


def _cholesky(x: jax.Array) -> jax.Array:
    flat = rows(jnp.tanh(x))
    square = flat @ flat.T / flat.shape[1] + jnp.eye(len(flat))
    return (jnp.linalg.cholesky(square) @ rows(x)).reshape(x.shape)


def _svd(x: jax.Array) -> jax.Array:
    """Only its values, which are well-conditioned."""
    values = jnp.linalg.svd(rows(x), compute_uv=False)
    return x + lax.stop_gradient(jnp.mean(values)) / 4


def _fft(x: jax.Array) -> jax.Array:
    return jnp.fft.ifft(jnp.fft.fft(rows(x)) * (0.6 + 0.8j)).real.reshape(x.shape)


def _callback(x: jax.Array) -> jax.Array:
    x = lax.stop_gradient(x) if x.ndim == 0 else x
    told = jax.pure_callback(
        lambda x: np.asarray(x), x, lax.stop_gradient(x), vmap_method="expand_dims"
    )
    return x / 2 + told / 2


def _float64(x: jax.Array) -> jax.Array:
    return lax.convert_element_type(x, jnp.float64).astype(jnp.float32)


def _size(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x) + 1)


@jax.custom_vjp
def _norm(x: jax.Array) -> jax.Array:
    """Its rule leaves out the gradient of the size."""
    return x / _size(x)


_norm.defvjp(lambda x: (_norm(x), x), lambda x, dy: (dy / _size(x),))


def _counted(x: jax.Array) -> jax.Array:
    """A loop without a matmul, of a length that is not known."""
    state = (0, lax.stop_gradient(x))
    state = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] / 2), state)
    return x / 2 + state[1]


def _running(x: jax.Array) -> jax.Array:
    """A loop without a matmul that adds up."""

    def body(total, row):
        total = 0.5 * total + row / 2
        return total, total

    flat = rows(x)
    return lax.scan(body, jnp.zeros(flat.shape[1]), flat)[1].reshape(x.shape)


def _bits(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.int32)
    return x / 2 + lax.bitcast_convert_type(bits, jnp.float32) / 2


def _precise(x: jax.Array) -> jax.Array:
    flat = rows(x)
    matrix = _fixed(flat.shape[1])
    return jnp.dot(flat, matrix, precision="highest").reshape(x.shape)


def _algorithm(x: jax.Array) -> jax.Array:
    flat = rows(x)
    matrix = _fixed(flat.shape[1])
    return jnp.dot(flat, matrix, precision="F32_F32_F32").reshape(x.shape)


def _full_precision(x: jax.Array) -> jax.Array:
    def inside(flat):
        return jnp.tanh(flat @ _fixed(flat.shape[1]))

    return jaxmp.full_precision(inside)(rows(x)).reshape(x.shape)


def _of_half(x: jax.Array) -> jax.Array:
    """A float32 result asked of half operands."""
    flat = rows(x)
    matrix = _fixed(flat.shape[1]).astype(jnp.bfloat16)
    out = lax.dot(flat.astype(jnp.bfloat16), matrix, preferred_element_type=jnp.float32)
    return out.reshape(x.shape)


def _cast(x: jax.Array) -> jax.Array:
    """A cast to float32 with the matmul that reads it."""
    flat = rows(x).astype(jnp.bfloat16).astype(jnp.float32)
    return (2 * flat @ _fixed(flat.shape[1])).reshape(x.shape) / 2


def _cast_and_scaled(x: jax.Array) -> jax.Array:
    """A cast to float32 that only a softmax reads."""
    return x * jax.nn.softmax(rows(x.astype(jnp.bfloat16).astype(jnp.float32))).reshape(
        x.shape
    )


WHOLE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "unknown": lambda x: _unknown_p.bind(x),
    "solve": _solve,
    "cholesky": _cholesky,
    "svd": _svd,
    "fft": _fft,
    "callback": _callback,
    "complex": lambda x: (x * (0.6 + 0.8j)).real + x / 2,
    "special": lambda x: special.erfcx(jnp.tanh(x)) / 2,
    "special_sum": lambda x: special.i0e(x) + special.ndtr(x),
    "sorted": lambda x: x / 2 + lax.stop_gradient(jnp.sort(x, None)).reshape(x.shape),
    "norm_by_rule": _norm,
    "counted": _counted,
    "running": _running,
    "bits": _bits,
    "reduced": lambda x: lax.reduce_precision(x, 8, 20),
    "unfit": lambda x: jnp.where(x > 1e30, x, x * 1e-30 * 1e30),
    "random": lambda x: x + jax.random.normal(jax.random.key(0), x.shape) / 4,
    "precise": _precise,
    "algorithm": _algorithm,
    "full_precision_of": _full_precision,
    "of_half": _of_half,
    "cast": _cast,
    "cast_and_scaled": _cast_and_scaled,
}
"""By name; each belongs to what one who writes in half by hand leaves in float32."""

FLOAT64 = {"float64": _float64}
"""Where float64 is enabled."""


def moved(x: jax.Array) -> jax.Array:
    """No more than a move, to compare with."""
    return jnp.flip(x)
