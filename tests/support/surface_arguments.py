"""What the functions of JAX's public surface are called with, and which are not."""

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.interpolate import RegularGridInterpolator
from jax.scipy.stats import gaussian_kde

_RANDOM = np.random.RandomState(0)


def _draw(low: float, high: float, *shape: int) -> np.ndarray:
    return _RANDOM.uniform(low, high, shape).astype(np.float32)


X, Y, Z = (_draw(0.1, 0.9, 4, 4) for _ in range(3))
"""Between 0 and 1, where nearly all functions are defined."""
SIGNED = _draw(-3, 3, 4, 4)
V, U = _draw(0.1, 0.9, 4), _draw(0.1, 0.9, 4)
VECTOR = _draw(-2, 2, 16)
POSITIVE = X @ X.T + 2 * np.eye(4, dtype=np.float32)
"""A positive definite matrix."""
REGULAR = X + 2 * np.eye(4, dtype=np.float32)
IMAGE = _draw(-1, 1, 2, 6, 6, 1)
INTS = np.arange(16, dtype=np.int32).reshape(4, 4) % 5
INDEX = np.array([2, 0, 3, 1], np.int32)


class Call:
    """Arguments of a call: float32 arrays are inputs, all else is part of the call."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    def bind(self, fn: Any) -> tuple[Any, tuple[Any, ...]]:
        """The call as a function of its float32 arrays, and these arrays.

        The arrays hold numbers of bfloat16, which float16 has too, so that casting
        them rounds nothing.
        """
        leaves, tree = jax.tree.flatten((self.args, self.kwargs))
        at = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
        ]

        def call(*arrays: Any) -> Any:
            filled = list(leaves)
            for i, array in zip(at, arrays, strict=True):
                filled[i] = array
            args, kwargs = jax.tree.unflatten(tree, filled)
            return fn(*args, **kwargs)

        return call, tuple(
            leaves[i].astype(jnp.bfloat16).astype(np.float32) for i in at
        )


def _calls(module: str, **calls: Any) -> dict[str, Call]:
    return {f"{module}.{name}": call for name, call in calls.items()}


def _quadratic(x: Any, center: Any) -> Any:
    return jnp.sum(jnp.square(x - center))


def _interpolated(values: Any, points: Any) -> Any:
    grid = (np.arange(4.0, dtype=np.float32),) * 2
    return RegularGridInterpolator(grid, values)(points)


def _density(data: Any, points: Any) -> Any:
    return gaussian_kde(data)(points)


DEFAULTS = (Call(X), Call(X, Y), Call(X, Y, Z))
"""Tried in this order on functions that are not in the table."""

_NN = [
    "celu",
    "elu",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "logmeanexp",
    "logsumexp",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softmax",
    "softplus",
    "sparse_plus",
    "sparse_sigmoid",
    "squareplus",
    "standardize",
    "swish",
    "tanh",
]
_QKV = [_draw(-1, 1, 2, 6, 2, 8) for _ in range(3)]
_COUNTS = np.array([1, 0, 3, 2], np.int32)

ARGUMENTS = MappingProxyType(
    dict.fromkeys((f"jax.nn.{name}" for name in _NN), Call(SIGNED))
    | _calls(
        "jax.nn",
        dot_product_attention=Call(*_QKV, is_causal=True),
        one_hot=Call(INTS, 5),
    )
    | _calls(
        "jax.scipy.special",
        bernoulli=Call(6),
        bessel_jn=Call(V, v=3),
        hyp2f1=Call(X, Y, Z + 1, Z / 2),
        multigammaln=Call(X + 2, 2),
        polygamma=Call(2, X),
        sph_harm_y=Call(INDEX, INDEX, V, U, n_max=4),
        expn=Call(2, X),
        comb=Call(X + 4, Y),
        zeta=Call(X + 1, Y),
        log_softmax=Call(SIGNED),
        softmax=Call(SIGNED),
        logsumexp=Call(SIGNED),
    )
    | _calls(
        "jax.scipy.linalg",
        cholesky=Call(POSITIVE),
        cho_factor=Call(POSITIVE),
        cho_solve=Call((REGULAR, True), X),
        convolution_matrix=Call(V, 6),
        dft=Call(4),
        eigh=Call(POSITIVE),
        eigh_tridiagonal=Call(V + 2, U[:3], eigvals_only=True),
        expm_frechet=Call(X, Y),
        funm=Call(REGULAR, jnp.exp),
        inv=Call(REGULAR),
        det=Call(REGULAR),
        leslie=Call(V, U[:3]),
        lu=Call(REGULAR),
        lu_factor=Call(REGULAR),
        lu_solve=Call((REGULAR, np.arange(4, dtype=np.int32)), X),
        polar=Call(REGULAR),
        rsf2csf=Call(np.triu(REGULAR), np.eye(4, dtype=np.float32)),
        solve=Call(REGULAR, X),
        solve_triangular=Call(REGULAR, X),
        solve_sylvester=Call(REGULAR, POSITIVE, X),
        sqrtm=Call(POSITIVE),
    )
    | _calls(
        "jax.scipy.signal",
        csd=Call(VECTOR, VECTOR[::-1].copy(), nperseg=8),
        welch=Call(VECTOR, nperseg=8),
        stft=Call(VECTOR, nperseg=8),
        convolve=Call(VECTOR, V),
        correlate=Call(VECTOR, V),
        fftconvolve=Call(VECTOR, V),
    )
    | _calls(
        "jax.scipy.ndimage",
        map_coordinates=Call(SIGNED, [2 * V, 3 * U], order=1, mode="nearest"),
    )
    | _calls("jax.scipy.optimize", minimize=Call(_quadratic, V, (U,), method="BFGS"))
    | _calls("jax.scipy.cluster.vq", vq=Call(X, Y))
    | _calls(
        "jax.scipy.stats.betabinom",
        **dict.fromkeys(("pmf", "logpmf"), Call(_COUNTS, 5, U, V)),
    )
    | _calls(
        "jax.scipy.stats.dirichlet",
        **dict.fromkeys(("pdf", "logpdf"), Call(V / V.sum(), U + 1)),
    )
    | _calls(
        "jax.scipy.stats.multinomial",
        **dict.fromkeys(("pmf", "logpmf"), Call(_COUNTS, 6, U / U.sum())),
    )
    | _calls(
        "jax.scipy.stats.multivariate_normal",
        **dict.fromkeys(("pdf", "logpdf"), Call(V, U, POSITIVE)),
    )
    | _calls(
        "jax.image",
        resize=Call(IMAGE, (2, 9, 4, 1), "linear"),
        scale_and_translate=Call(IMAGE, (2, 9, 4, 1), (1, 2), V[:2], U[:2], "cubic"),
    )
    | _calls(
        "jax.ops",
        segment_max=Call(X, INDEX, 4),
        segment_min=Call(X, INDEX, 4),
        segment_prod=Call(X, INDEX // 2, 2),
        segment_sum=Call(X, INDEX // 2, 2),
    )
    | _calls(
        "jax.numpy.linalg",
        cholesky=Call(POSITIVE),
        cross=Call(X[:, :3], Y[:, :3]),
        det=Call(REGULAR),
        eigh=Call(POSITIVE),
        eigvalsh=Call(POSITIVE),
        inv=Call(REGULAR),
        lstsq=Call(REGULAR, X),
        matrix_power=Call(X, 3),
        multi_dot=Call([X, Y, Z]),
        outer=Call(V, U),
        pinv=Call(REGULAR),
        slogdet=Call(REGULAR),
        solve=Call(REGULAR, X),
        tensorinv=Call(REGULAR, ind=1),
        tensorsolve=Call(REGULAR, V),
    )
    | _calls(
        "jax.numpy",
        acosh=Call(X + 1),
        arccosh=Call(X + 1),
        apply_along_axis=Call(jnp.cumsum, 0, X),
        apply_over_axes=Call(jnp.sum, X, [0]),
        argpartition=Call(X, 2),
        argwhere=Call(X, size=16),
        array_split=Call(X, 2),
        astype=Call(X, jnp.float32),
        bincount=Call(INDEX, V, length=4),
        broadcast_to=Call(V, (4, 4)),
        choose=Call(INDEX, [V, U, V, U], mode="clip"),
        compress=Call(np.array([True, False, True, True]), X, axis=0, size=3),
        convolve=Call(VECTOR, V),
        correlate=Call(VECTOR, V),
        cross=Call(X[:, :3], Y[:, :3]),
        cumulative_prod=Call(V),
        cumulative_sum=Call(V),
        delete=Call(X, 1, axis=0),
        digitize=Call(X, np.sort(V)),
        dsplit=Call(IMAGE, 2),
        einsum=Call("ij,jk->ik", X, Y),
        expand_dims=Call(X, 0),
        extract=Call(np.eye(4, dtype=bool), X, size=4),
        fill_diagonal=Call(X, V, inplace=False),
        flatnonzero=Call(X, size=16),
        full=Call((4,), V),
        geomspace=Call(np.asarray(V[0]), np.asarray(U[0]), 5),
        histogram2d=Call(V, U, bins=3),
        hsplit=Call(X, 2),
        insert=Call(X, 1, V, axis=0),
        interp=Call(X, np.array([0, 0.25, 0.5, 1], np.float32), U),
        intersect1d=Call(V, U, size=4),
        ldexp=Call(X, INTS),
        matvec=Call(X, V),
        meshgrid=Call(V, U),
        moveaxis=Call(X, 0, 1),
        nanpercentile=Call(X, 30.0),
        nanquantile=Call(X, 0.3),
        nonzero=Call(X, size=16),
        pad=Call(X, 1),
        partition=Call(X, 2),
        percentile=Call(X, 30.0),
        permute_dims=Call(X, (1, 0)),
        piecewise=Call(X, [np.eye(4, dtype=bool)], [jnp.sin, jnp.cos]),
        place=Call(X, np.eye(4, dtype=bool), V, inplace=False),
        # Negative roots and a large remainder: no small difference of large numbers,
        # which half has no digits for.
        poly=Call(-V),
        polyder=Call(V),
        polydiv=Call(V, np.array([0.5, 2], np.float32)),
        polyfit=Call(V, U, 1),
        polyint=Call(V),
        polymul=Call(V, U),
        polyval=Call(V, X),
        put=Call(X, INDEX, V, inplace=False),
        put_along_axis=Call(X, INDEX[:, None], V[:, None], axis=1, inplace=False),
        quantile=Call(X, 0.3),
        repeat=Call(X, 2, axis=0),
        reshape=Call(X, (2, 8)),
        resize=Call(X, (3, 4)),
        roll=Call(X, 1),
        rollaxis=Call(X, 1),
        roots=Call(V, strip_zeros=False),
        searchsorted=Call(np.sort(V), U),
        select=Call([np.eye(4, dtype=bool)], [X]),
        setdiff1d=Call(V, U, size=4),
        setxor1d=Call(V, U, size=8),
        split=Call(X, 2),
        swapaxes=Call(X, 0, 1),
        take=Call(X, INDEX, axis=0),
        take_along_axis=Call(X, INDEX[:, None], axis=1),
        tile=Call(X, (2, 1)),
        union1d=Call(V, U, size=8),
        unique=Call(X, size=16),
        unique_all=Call(X, size=16),
        unique_counts=Call(X, size=16),
        unique_inverse=Call(X, size=16),
        unique_values=Call(X, size=16),
        vander=Call(V),
        vecmat=Call(V, X),
        vectorize=Call(jnp.sin),
        vsplit=Call(X, 2),
        where=Call(np.eye(4, dtype=bool), X, Y),
    )
)
"""Arguments of the functions that need special ones."""

_REASONS = {
    "makes arrays of no float": """
        jax.numpy: arange bartlett blackman diag_indices empty eye fromfunction hamming
        hanning identity indices kaiser mask_indices ones tri tril_indices triu_indices
        zeros
        jax.numpy.fft: fftfreq rfftfreq
        jax.scipy.linalg: dft hadamard helmert hilbert invhilbert invpascal pascal
        """,
    "takes integers": """
        jax.numpy: bitwise_and bitwise_count bitwise_invert bitwise_left_shift
        bitwise_not bitwise_or bitwise_right_shift bitwise_xor gcd invert ix_ lcm
        left_shift packbits ravel_multi_index right_shift unpackbits unravel_index
        jax.scipy.special: bernoulli
        """,
    "concerns dtypes, shapes, files or printing": """
        jax.numpy: array_repr array_str broadcast_shapes can_cast einsum_path
        from_dlpack frombuffer fromfile fromiter fromstring get_printoptions isdtype
        issubdtype iscomplexobj isrealobj isscalar iterable load ndim printoptions
        promote_types result_type save savez set_printoptions shape size
        jax.nn: get_scaled_dot_general_config
        """,
    "makes a function": """
        jax.numpy: frompyfunc vectorize
        """,
    "cannot be traced": """
        jax.numpy: trim_zeros
        """,
    "promotes ranks implicitly": """
        jax.scipy.stats.poisson: entropy
        """,
    "does not run on CPUs": """
        jax.nn: scaled_dot_general scaled_matmul
        """,
}


def _excluded() -> dict[str, str]:
    names = {}
    for reason, text in _REASONS.items():
        module = ""
        for word in text.split():
            if word.endswith(":"):
                module = word[:-1]
            else:
                names[f"{module}.{word}"] = reason
    return names


EXCLUDED = MappingProxyType(_excluded())
"""Functions that are not called, each with the reason."""

VARIANTS = MappingProxyType(
    {
        "jax.scipy.interpolate.RegularGridInterpolator": (
            _interpolated,
            Call(X, 3 * Y[:, :2]),
        ),
        "jax.scipy.stats.gaussian_kde": (_density, Call(VECTOR, V)),
    }
    | {
        f"jax.image.resize[{method}]": (
            jax.image.resize,
            Call(IMAGE, (2, 9, 4, 1), method),
        )
        for method in ("nearest", "cubic", "lanczos3", "lanczos5")
    }
    | {
        f"jax.numpy.linalg.norm[{order}]": (jnp.linalg.norm, Call(X, order))
        for order in (1, 2, "nuc", np.inf)
    }
    | {
        f"jax.numpy.einsum[{spec}]": (jnp.einsum, Call(spec, *arrays))
        for spec, arrays in {
            "ij->ji": (X,),
            "ii": (X,),
            "ij,ij->i": (X, Y),
            "ij,jk,kl->il": (X, Y, Z),
        }.items()
    }
)
"""Further calls of some functions."""
