"""The first and the last of the numbered blocks of layers in a model."""

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from jaxmp import _warnings
from jaxmp.errors import NoBlocksWarning

_NUMBERED = re.compile(r"(.*?)_?(\d+)")


@dataclasses.dataclass(frozen=True)
class FirstAndLast:
    """The condition of a rule: to be in one of the first or the last blocks.

    Which they are is known when all layers are: `among` says it then.

    Attributes:
      blocks: how many of the first, and of the last.
      paths: those of the blocks; None until they are known.
    """

    blocks: int
    paths: frozenset[str] | None = None

    def __call__(self, path: str, module: Any) -> bool:
        """Whether a layer is in one of the blocks."""
        del module
        return is_in(path, self.paths or ())

    def among(self, paths: Iterable[str]) -> "FirstAndLast":
        """The same for a model whose layers have these paths."""
        return dataclasses.replace(self, paths=outer_blocks(paths, self.blocks))


def outer_blocks(paths: Iterable[str], blocks: int) -> frozenset[str]:
    """The paths of the first and the last blocks among layers.

    Blocks have one name and a number each: `block_0` to `block_11`, `encoder/layer/0`
    to `encoder/layer/5`. Where numbered layers stand in numbered blocks, the blocks
    count.

    Args:
      paths: of layers, such as `"block_0/attention/query"`.
      blocks: how many of the first, and of the last.

    Returns:
      Paths of blocks; none if nothing is numbered.
    """
    groups: dict[tuple[str, str], dict[int, str]] = collections.defaultdict(dict)
    layers = [path.split("/") for path in paths]
    for parts in layers:
        for depth, part in enumerate(parts):
            if (found := _NUMBERED.fullmatch(part)) is not None:
                around = "/".join(parts[:depth])
                block = "/".join(parts[: depth + 1])
                groups[around, found[1]][int(found[2])] = block
    several = {
        block: group
        for group in groups.values()
        if len(group) > 1
        for block in group.values()
    }
    outer = set()
    for parts in layers:
        prefixes = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        block = next((prefix for prefix in prefixes if prefix in several), None)
        if block is not None:
            ordered = [several[block][number] for number in sorted(several[block])]
            outer |= {*ordered[:blocks], *ordered[len(ordered) - blocks :]}
    return frozenset(outer)


def warn_of_no_blocks(paths: Iterable[str]) -> None:
    """Warns that none of these layers stand in numbered blocks."""
    shown = ", ".join(sorted(set(paths) - {""})[:5]) or "none: there are no name scopes"
    _warnings.warn(
        "first_and_last_in_half() finds no numbered blocks, such as block_0 and "
        f"block_1, among the paths of the matmuls ({shown}), and leaves nothing in "
        "half. Layers that run in one scan are one block. Name what is to stay in "
        "half: OpRule(path=..., quantize='none') for autocast, PolicyRule(path=..., "
        "quantize='none') for apply_policy.",
        NoBlocksWarning,
    )


def is_in(path: str, blocks: Iterable[str]) -> bool:
    """Whether a layer is one of some blocks, or stands in one."""
    return any(path == block or path.startswith(f"{block}/") for block in blocks)
