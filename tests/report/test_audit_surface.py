"""No function of JAX on half arrays is taken for a silent widening."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp import errors
from jaxmp.report import audit
from tests.support.surface import surface

pytestmark = pytest.mark.slow

# One multiplies by a table of JAX's own, in float32, and the other's grid is float32.
WIDENS = {
    "jax.scipy.special.owens_t",
    "jax.scipy.interpolate.RegularGridInterpolator",
}


def as_half(x):
    is_float32 = getattr(x, "dtype", None) == np.float32
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) if is_float32 else x


def gradient(fn):
    def total(x, *rest):
        outs = jax.tree.leaves(fn(x, *rest))
        floating = (y for y in outs if jnp.issubdtype(y.dtype, jnp.inexact))
        return sum(jnp.sum(jnp.real(y)).astype(jnp.float32) for y in floating)

    return jax.grad(total)


@pytest.mark.parametrize("form", [lambda fn: fn, gradient], ids=["plain", "gradient"])
@pytest.mark.filterwarnings("ignore")
def test_functions_of_jax_widen_nothing(form):
    audited, widening = 0, set()
    for function in surface()[0]:
        args = jax.tree.map(as_half, function.args)
        try:
            found = audit(form(function.fn), *args)
        except errors.StepDoesNotTrace:  # Not made for bfloat16, or not differentiable.
            continue
        audited += 1
        if found.widenings:
            widening.add(function.name)
    assert audited > 400
    assert widening <= WIDENS
