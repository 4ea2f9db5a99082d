"""Which operation runs in which dtype: one table, each line with its reason.

The lists are those of PyTorch's autocast and of TensorFlow's graph rewrite, read
against each other and translated to JAX's primitives. `docs/op_lists.md` is printed
from this table: `python -m jaxmp.casting.ops._op_lists`.

References:
  PyTorch, `aten/src/ATen/autocast_mode.h`; TensorFlow,
  `core/grappler/optimizers/auto_mixed_precision_lists.h`.
"""

import enum
from types import MappingProxyType
from typing import NamedTuple


class OpClass(enum.Enum):
    """What decides the dtype of an operation."""

    COMPUTE = "compute"
    """Operands and result in the compute dtype; accumulation in float32 inside."""
    FULL = "full"
    """Computed in float32; the result is handed back in the compute dtype."""
    FOLLOW = "follow"
    """Whatever the neighbours are: elementwise arithmetic and movement of data."""
    UNTOUCHED = "untouched"
    """Bound as it was traced, with operands of the dtypes it was traced with."""


class Entry(NamedTuple):
    """One line of the table."""

    op_class: OpClass
    primitives: tuple[str, ...]
    reason: str


def _entry(op_class: OpClass, primitives: str, reason: str) -> Entry:
    return Entry(op_class, tuple(primitives.split()), reason)


_OPAQUE = (
    "pallas_call ffi_call pure_callback io_callback debug_callback debug_print "
    "custom_call"
)

TABLE = (
    _entry(
        OpClass.COMPUTE,
        "dot_general ragged_dot_general conv_general_dilated",
        "Tensor Cores and MXUs multiply half operands and accumulate in float32; "
        "on PyTorch's lower-precision list and TensorFlow's allow list",
    ),
    _entry(
        OpClass.FULL,
        "exp exp2 expm1 pow sinh cosh",
        "overflows float16 above 11, and a rounded argument is a relative error; "
        "denied by TensorFlow, float32 in PyTorch",
    ),
    _entry(
        OpClass.FULL,
        "log log1p log2 lgamma digamma polygamma zeta igamma igammac igamma_grad_a "
        "regularized_incomplete_beta bessel_i0e bessel_i1e erf_inv random_gamma",
        "small arguments are where half has no numbers; float32 in PyTorch",
    ),
    _entry(
        OpClass.FULL,
        "integer_pow square sqrt rsqrt cbrt one_minus_square polynomial",
        "squares overflow float16 above 255 and roots have an infinite slope at zero; "
        "pow and rsqrt are float32 in PyTorch, these are mostly statistics of norms",
    ),
    _entry(
        OpClass.FULL,
        "tanh logistic erf erfc sin cos tan asin acos atan asinh acosh atanh atan2",
        "compilers compute them in float32 anyway; the result goes back in half, and "
        "what the gradient needs is computed again from the half input",
    ),
    _entry(
        OpClass.FULL,
        "reduce_sum reduce_prod reduce reduce_window reduce_window_sum cumsum cumprod "
        "cumlogsumexp select_and_scatter_add",
        "a sum of n terms in half stops growing at 256 (bfloat16) or 2048 (float16); "
        "denied by TensorFlow, float32 in PyTorch",
    ),
    _entry(
        OpClass.FULL,
        "scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul",
        "segment sums and embedding gradients: one row may be hit a thousand times",
    ),
    _entry(
        OpClass.FULL,
        "psum psum_invariant reduce_scatter unreduced_psum unreduced_reduce_scatter",
        "a sum over devices is a sum, and float16 overflows at 65504",
    ),
    _entry(
        OpClass.FULL,
        "argmax argmin nextafter rem reduce_precision",
        "ties and last digits decide the result",
    ),
    _entry(
        OpClass.FOLLOW,
        "add sub mul div add_any max min clamp select_n dot_product",
        "arithmetic of two neighbours; infer list of TensorFlow, input dtype in "
        "PyTorch",
    ),
    _entry(
        OpClass.FOLLOW,
        "eq ne lt le gt ge eq_to le_to lt_to is_finite",
        "a comparison returns no float",
    ),
    _entry(
        OpClass.FOLLOW,
        "neg abs sign floor ceil round stop_gradient copy copy_p name real_identity "
        "sharding_constraint optimization_barrier anew cpu_barrier pvary pcast "
        "reduce_max reduce_min cummax cummin reduce_window_max reduce_window_min "
        "select_and_gather_add sort top_k approx_top_k "
        "scatter-max scatter_max scatter-min scatter_min",
        "exact in every dtype: the result is one of the operands, or its sign",
    ),
    _entry(
        OpClass.FOLLOW,
        "reshape squeeze expand_dims transpose broadcast_in_dim tile concatenate stack "
        "unstack split slice dynamic_slice dynamic_update_slice gather scatter pad rev "
        "all_gather all_gather_invariant all_gather_reduced all_to_all "
        "ragged_all_to_all ppermute pmax pmin pbroadcast pbroadcast_dynamic "
        "reshard relayout layout_constraint mesh_cast preduced "
        "reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast "
        "vary_unreduced_cast_p",
        "moves data; clear list of TensorFlow",
    ),
    _entry(
        OpClass.UNTOUCHED,
        "cholesky lu qr svd eig eigh schur hessenberg householder_product "
        "triangular_solve tridiagonal tridiagonal_solve linear_solve custom_lin fft "
        "geqrf geqp3 ormqr cholesky_update symmetric_product lu_pivots_to_permutation",
        "linear algebra and FFT have no half kernels, and conditioning eats digits",
    ),
    _entry(
        OpClass.UNTOUCHED,
        "bitcast_convert_type random_bits random_seed random_split random_fold_in "
        "random_wrap random_unwrap threefry2x32 rng_bit_generator rng_uniform iota "
        "real imag complex conj convert_element_type",
        "bits, keys, counters and casts mean what they say",
    ),
    _entry(
        OpClass.UNTOUCHED,
        _OPAQUE,
        "opaque: was written for the dtypes it was traced with",
    ),
)
"""Every primitive with an opinion. What is not here is untouched."""

CLASS_OF = MappingProxyType(
    {name: entry for entry in TABLE for name in entry.primitives}
)
"""The table by primitive name."""

OPAQUE = frozenset(_OPAQUE.split())
"""What is inside cannot be read."""

UNKNOWN = Entry(OpClass.UNTOUCHED, (), "unknown primitive: bound whole, as traced")


def table_as_markdown() -> str:
    """Prints the table for the documentation."""
    lines = ["| class | primitives | reason |", "|---|---|---|"]
    for entry in TABLE:
        names = ", ".join(f"`{name}`" for name in entry.primitives)
        lines.append(f"| {entry.op_class.value} | {names} | {entry.reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_as_markdown())
