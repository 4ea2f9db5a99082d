"""What is multiplied where a matmul's operands are stored in float8 or int8.

A dot of float8 operands is no promise of float8 arithmetic: a device without units for
it converts both operands, and multiplies them in half. So does a GPU with units, unless
it runs a kernel that uses them.
"""

import re

from jaxmp.report.compile.chips import Units
from jaxmp.report.hlo._program import Instruction

_FAMILIES = {
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
    "int8": "int8",
    "uint8": "int8",
}
_HALF = {"gpu": "float16", "tpu": "bfloat16"}
_WIDE = {"float8": "float32", "int8": "int32"}
_FLOAT8_LIBRARY = "__cublas$lt$matmul$f8"

# A warp group, and the rows that it multiplies at once ("PTX ISA", wgmma.mma_async).
_WARPS, _ROWS = 4, 64


def multiplied_dtype(
    stored: str, instruction: Instruction, caller: Instruction | None, units: Units
) -> str:
    """The dtype that a matmul multiplies in.

    Args:
      stored: the dtype of its operands.
      instruction: the matmul.
      caller: the fusion that it stands in; None outside of one.
      units: of the device.

    Returns:
      The dtype of the operands, or what they are converted to: half. A CPU, whose half
      is emulated too, counts as converting to float32 or int32.
    """
    family = _FAMILIES.get(stored)
    if family is None:
        return stored
    if units.platform == "gpu":
        is_native = _uses_units(family, instruction, caller, units)
    else:
        is_native = family in units.formats
    return stored if is_native else _HALF.get(units.platform, _WIDE[family])


def _uses_units(
    family: str, instruction: Instruction, caller: Instruction | None, units: Units
) -> bool:
    """Whether the kernel of a GPU multiplies the format, not what it converts it to.

    cuBLASLt has a call of its own for float8, which XLA makes only for GPUs with units.
    Triton multiplies int8 in tiles of any size, float8 on an H100 only in tiles for a
    whole warp group (read from the PTX that XLA 0.10.2 makes of both); for others it
    converts to float16. A loop that XLA writes itself uses no units.
    """
    target = instruction.attribute("custom_call_target")
    if target:
        is_int8 = family == "int8" and family in units.formats
        return target == _FLOAT8_LIBRARY or is_int8
    if family not in units.formats or caller is None:
        return False
    if "__triton" not in caller.attributes:
        return False
    return family == "int8" or _is_for_warp_group(instruction, caller)


def _is_for_warp_group(instruction: Instruction, caller: Instruction) -> bool:
    warps = re.search(r'num_warps\\?":\\?"?(\d+)', caller.attributes)
    tile = re.search(
        r'output_tiles\\?":\[\{\\?"sizes\\?":\[([^\]]*)\]', caller.attributes
    )
    if warps is None or tile is None:
        return False
    # The tile is that of the result, whose rows are those of the matmul if it is whole.
    if caller.arrays[0].dims != instruction.arrays[0].dims:
        return False
    sizes = [int(n) for n in re.findall(r"\d+", tile[1])]
    return int(warps[1]) % _WARPS == 0 and sizes[-2] % _ROWS == 0
