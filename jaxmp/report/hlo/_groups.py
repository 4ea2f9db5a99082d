"""How many devices a collective runs over: the four ways in which XLA writes groups."""

import math
import re
from collections.abc import Iterable

from jaxmp._warnings import warn
from jaxmp.report.hlo._program import HloProgram, Instruction

_OVER_PARTITIONS_TOO = ("all-gather", "all-reduce", "reduce-scatter")
_GROUPS = re.compile(r"\breplica_groups=(.*)")
_LISTED = re.compile(r"\{([\d,\s]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d,\s]*\},?\s*)*)\}")
# `mesh['a'=2,'b'=4] {'b'}`, before that `@mesh<a=2,b=4> {b}`; a part of an axis is
# `'b':(1)2`, and the order of the devices may stand between the two.
_MESH = re.compile(
    r"@?mesh[\[<](?P<sizes>[^\]>]*)[\]>]"
    r"(?:,\s*device_ids=\((?:[^()]|\([^()]*\))*\))?"
    r",?\s*(?:axes\s*)?\{(?P<axes>[^}]*)\}"
)
_SIZE = re.compile(r"'?([\w.-]+)'?\s*=\s*(\d+)")
_AXIS = re.compile(r"'?([\w.-]+)'?(?::\(\d+\)(\d+))?")


def group_size(instruction: Instruction, kind: str, program: HloProgram) -> int:
    """Over how many devices a collective runs; of unequal groups the largest.

    Source: `CollectiveOpGroupMode` in xla/service/collective_ops_utils.h, and
    `MeshAxesReplicaGroupList` in xla/hlo/ir/replica_group.h.

    Args:
      instruction: the collective.
      kind: its opcode, without `-start`.
      program: where it stands. Without groups it runs over all devices.
    """
    if pairs := _PAIRS.search(instruction.attributes):
        return _largest_ring(_numbers(pair) for pair in _LISTED.findall(pairs[1]))
    listed = _listed_size(instruction.attributes)
    if "channel_id=" not in instruction.attributes:
        return listed or program.replicas
    if "use_global_device_ids=true" in instruction.attributes:
        return listed or program.replicas * program.partitions
    if kind in _OVER_PARTITIONS_TOO:
        return (listed or program.replicas) * program.partitions
    return listed or program.partitions


def _listed_size(attributes: str) -> int:
    """Devices in the largest group that is listed; 0 if none is."""
    found = _GROUPS.search(attributes)
    if found is None:
        return 0
    groups = found[1]
    if groups.startswith("{"):
        # Up to the next attribute: `{{0,1},{2,3}}`.
        listed = re.split(r",\s*\w+=", groups)[0]
        sizes = [len(_numbers(group)) for group in _LISTED.findall(listed)]
        return max(sizes, default=0)
    if iota := re.match(r"\[\d+,(\d+)\]", groups):
        return int(iota[1])
    if mesh := _MESH.match(groups):
        sizes = {name: int(size) for name, size in _SIZE.findall(mesh["sizes"])}
        axes = _AXIS.findall(mesh["axes"])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    warn(
        "XLA wrote groups of devices in a form that jaxmp cannot read: "
        f"{groups[:80]!r}. This collective is counted as one over all devices. Please "
        "report the form."
    )
    return 0


def _largest_ring(pairs: Iterable[list[int]]) -> int:
    """Devices in the largest ring or chain of senders and receivers."""
    rings: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = rings.get(source, {source}) | rings.get(target, {target})
        rings.update(dict.fromkeys(joined, joined))
    return max(map(len, rings.values()), default=1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
