"""Classes of primitives that more than one reader of jaxprs knows, by name."""

CAST = "convert_element_type"

MATMULS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot_general"))
"""Those that JAX has, which autocast may turn into those below."""
SCALED_DOT = "scaled_dot"
MATMUL_OF_TANGENT = "quantized_matmul_of_tangent"
ALL_MATMULS = MATMULS | {SCALED_DOT, MATMUL_OF_TANGENT}
"""What counts as a matmul in a finished program: those of `jaxmp.quantization` too."""
ADDS = frozenset(("add", "add_any", "sub"))
SCALES = frozenset(("mul", "div", "neg", "select_n"))
SUMS_INTO = frozenset(("scatter-add", "scatter_add", "scatter-sub", "scatter_sub"))
COLLECTIVES = frozenset(
    [
        "psum",
        "psum_invariant",
        "unreduced_psum",
        "pmax",
        "pmin",
        "all_gather",
        "all_gather_invariant",
        "all_gather_reduced",
        "reduce_scatter",
        "unreduced_reduce_scatter",
        "ppermute",
        "all_to_all",
        "ragged_all_to_all",
    ]
)
"""Communications between devices."""
PLACEMENTS = frozenset(("reshard", "sharding_constraint"))
"""They say where an array is to live; a gradient is not summed there."""
GATHERS = PLACEMENTS | frozenset(
    ("all_gather", "all_gather_invariant", "all_gather_reduced")
)
"""They may bring a divided array together on every device; no value changes."""
REDUCES = frozenset(("reduce_sum", "reduce_max", "reduce_min", "psum", "pmax"))

RESULT_DTYPES = frozenset(("new_dtype", "preferred_element_type", "dtype"))
"""The parameters that name the dtype of a result."""

LAYOUT = frozenset(
    [
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "broadcast_in_dim",
        "stop_gradient",
        "copy",
        "anew",
        "cpu_barrier",
        "copy_p",
        "name",
        "sharding_constraint",
        "reshard",
        "relayout",
        "layout_constraint",
        "mesh_cast",
        "pvary",
        "pcast",
        "slice",
        "rev",
        "tile",
    ]
)
"""They only move data, and so carry a constant's value along."""

SELECTING = frozenset(["max", "min", "clamp", "reduce_window_max", "reduce_window_min"])
"""They pick entries of one array by size.

Rounding keeps the order of numbers, so that it may come before or after them.
"""

LINEAR = LAYOUT | frozenset(
    [
        "add",
        "sub",
        "add_any",
        "neg",
        "reduce_sum",
        CAST,
        "concatenate",
        "pad",
        "cumsum",
        "reduce_window_sum",
        "select_n",
        "dynamic_slice",
        "gather",
    ]
)
"""Their gradient needs none of their floating operands."""
