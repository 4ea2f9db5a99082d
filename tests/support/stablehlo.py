"""Casts in a lowered program: which are undone at once, and what is cast how often."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from jaxmp._jaxpr.lowered import merge_common_subexpressions

_CONVERT = "stablehlo.convert"
_LAYOUT = ("stablehlo.transpose", "stablehlo.reshape", "stablehlo.broadcast_in_dim")
_LOOPS = ("stablehlo.while",)


class Program:
    """A lowered program after common subexpressions are merged.

    A value is followed through the functions that JAX lowers a jitted function to, as
    if they were inlined, which is what XLA does first.
    """

    def __init__(self, lowered: Any):
        """Takes what `jax.jit(fn).lower(*args)` returned."""
        self.module = lowered.compiler_ir("stablehlo")
        merge_common_subexpressions(self.module)
        self.functions = {f.attributes["sym_name"].value: f for f in self.module.body}
        self.calls: dict[str, list[Any]] = {}
        for function in self.functions.values():
            for op, _ in _walk(function.operation):
                if op.name == "func.call":
                    self.calls.setdefault(_callee(op), []).append(op)

    def round_trips(self) -> Counter[str]:
        """Counts casts from one dtype to another and back, with no operation between.

        A value that is narrowed for one reader and widened again for another is stored
        in the narrow dtype, and not counted.

        Returns:
          How often there is each, such as `"bf16 f32 bf16"`, and where the first of the
          three comes from: `"bf16 f32 bf16 after dot_general"`.
        """
        found = Counter[str]()
        for op, _ in self._converts():
            for value in self._origins(op.operands[0]):
                if _name(value.owner) != _CONVERT or _is_stored(value, op):
                    continue
                for source in self._origins(value.owner.operands[0]):
                    dtypes = [_element_type(v) for v in (source, value, op.results[0])]
                    if dtypes[0] == dtypes[2]:
                        origin = _name(source.owner).removeprefix("stablehlo.")
                        found[f"{' '.join(dtypes)} after {origin}"] += 1
        return found

    def casts_of_arguments(self, dtype: str) -> Counter[int]:
        """Counts the casts of each argument as a whole, outside of loops.

        Args:
          dtype: that they are cast to, such as `"bf16"`.

        Returns:
          The number of casts by position among the arguments.
        """
        arguments = list(self.functions["main"].regions[0].blocks[0].arguments)
        found = Counter[int]()
        for op, is_in_loop in self._converts():
            if is_in_loop or _element_type(op.results[0]) != dtype:
                continue
            for source in self._moved(op.operands[0]):
                if source in arguments:
                    found[arguments.index(source)] += 1
        return found

    def _converts(self) -> Iterator[tuple[Any, bool]]:
        for function in self.functions.values():
            for op, is_in_loop in _walk(function.operation):
                if op.name == _CONVERT:
                    yield op, is_in_loop

    def _moved(self, value: Any) -> list[Any]:
        """What a value was before it was only reshaped or transposed."""
        found = []
        for v in self._origins(value):
            is_moved = _name(v.owner) in _LAYOUT
            found += self._moved(v.owner.operands[0]) if is_moved else [v]
        return found

    def _origins(self, value: Any) -> list[Any]:
        """What a value is outside of the functions that it was given to or came from.

        A function that is called in several places has several.
        """
        owner = value.owner
        if _name(owner) == "func.call":
            body = self.functions[_callee(owner)].regions[0].blocks[0]
            *_, last = body.operations
            return self._origins(last.operands[list(owner.results).index(value)])
        calls = self.calls.get(_function(owner), ()) if _name(owner) == "block" else ()
        found = [v for c in calls for v in self._origins(c.operands[value.arg_number])]
        return found or [value]


def _walk(op: Any, is_in_loop: bool = False) -> Iterator[tuple[Any, bool]]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                inner = inner.operation
                yield inner, is_in_loop
                yield from _walk(inner, is_in_loop or inner.name in _LOOPS)


def _is_stored(value: Any, widened: Any) -> bool:
    is_narrow = _width(value) < _width(widened.results[0])
    return is_narrow and any(_name(use.owner) != _CONVERT for use in value.uses)


def _width(value: Any) -> int:
    return value.type.element_type.width


def _name(owner: Any) -> str:
    # The owner of an argument of a block is the block.
    return getattr(owner, "name", "block")


def _callee(op: Any) -> str:
    return op.attributes["callee"].value


def _function(block: Any) -> str:
    owner = block.owner
    is_entry = owner.operation.name == "func.func"
    return owner.attributes["sym_name"].value if is_entry else ""


def _element_type(value: Any) -> str:
    return str(value.type.element_type)
