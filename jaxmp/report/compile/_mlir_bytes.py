"""A lowered program as bytes, for another process that compiles it.

Why not `jax.export`: the program that is compiled would call the exported one, with
some operations spelt out for the sake of other versions. The TPU's compiler may plan
that differently, and its figures would not be those of the step under `jax.jit`.
"""

import functools
import io
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir
from jaxlib.mlir import ir

from jaxmp._jaxpr.lowered import with_module

_DTYPES = (
    *("bool", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("int2", "int4", "int8", "int16", "int32", "int64"),
    *("uint2", "uint4", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "float4_e2m1fn",
)


def write_module(lowered: Any) -> bytes | None:
    """Writes a lowered step.

    Args:
      lowered: what the step's `.lower(...)` returned.

    Returns:
      An MLIR module; None for a step that is divided over devices.
    """
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        counts = [
            ir.IntegerAttr(module.operation.attributes[f"mhlo.num_{kind}"]).value
            for kind in ("partitions", "replicas")
        ]
    if counts != [1, 1]:
        return None
    written = io.BytesIO()
    module.operation.write_bytecode(written)
    return written.getvalue()


def lower_module(module: bytes, donated: Sequence[bool], device: Any) -> Any:
    """Lowers a module for a device.

    Args:
      module: what `write_module` wrote.
      donated: whether each argument is donated.
      device: what it will be compiled for.

    Returns:
      A `jax.stages.Lowered`.
    """
    with mlir.make_ir_context():
        parsed = ir.Module.parse(module)
        inputs, outputs = _types(_main(parsed))

    def of_the_same_types(*args: Any) -> Any:
        return [jnp.zeros(*shaped) for shaped in outputs]

    sharding = jax.sharding.SingleDeviceSharding(device)
    jitted = jax.jit(
        of_the_same_types,
        in_shardings=sharding,
        out_shardings=sharding,
        donate_argnums=tuple(i for i, flag in enumerate(donated) if flag),
        keep_unused=True,
    )
    lowered = jitted.lower(*(jax.ShapeDtypeStruct(*shaped) for shaped in inputs))
    return with_module(lowered, parsed)


def _main(module: Any) -> Any:
    for operation in module.body.operations:
        if _name(operation) == "main":
            return operation
    raise ValueError("The module has no function named main.")


def _name(operation: Any) -> str:
    return ir.StringAttr(operation.attributes["sym_name"]).value


def _types(main: Any) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """Shapes and dtypes of a function's arguments and results."""
    kind = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
    return list(map(_shaped, kind.inputs)), list(map(_shaped, kind.results))


def _shaped(kind: Any) -> tuple[tuple[int, ...], Any]:
    array = ir.RankedTensorType(kind)
    return tuple(array.shape), _dtypes()[str(array.element_type)]


@functools.cache
def _dtypes() -> dict[str, Any]:
    known = [jnp.dtype(name) for name in _DTYPES if hasattr(jnp, name)]
    return {str(mlir.dtype_to_ir_type(dtype)): dtype for dtype in known}
