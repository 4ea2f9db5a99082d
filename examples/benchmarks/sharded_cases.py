"""What is measured on eight devices, and what it has to reach."""

import itertools
from typing import Any, NamedTuple

from models.transformers import SMALL, TIED
from sharded_steps import Case

JAXMP = (
    ("linen", "apply_policy"),
    ("nnx", "apply_policy"),
    ("functions", "autocast"),
)
WRITTEN = tuple(written for written, _ in JAXMP)
REDUCE = (None, "float32")


def _every_way(**fields: Any) -> list[Case]:
    """FSDP by hand, and in jaxmp's ways, each with both ways to reduce."""
    hands = [Case("FSDP", written, "by hand", **fields) for written in WRITTEN]
    return hands + [
        Case("FSDP", *way, reduce, **fields)
        for reduce, way in itertools.product(REDUCE, JAXMP)
    ]


def _in_linen(layout: str, **fields: Any) -> list[Case]:
    """By hand, and under a policy with both ways to reduce."""
    return [
        Case(layout, "linen", "by hand", **fields),
        *(Case(layout, "linen", "apply_policy", r, **fields) for r in REDUCE),
    ]


def _one_reduction(layout: str, gather: str | None) -> list[Case]:
    """One reduction for four micro-batches, in both dtypes."""
    return [
        Case(layout, "linen", "apply_policy", dtype, 4, data_axes=True, gather=gather)
        for dtype in ("bfloat16", "float32")
    ]


_TODAY = [
    Case(layout, "linen", "apply_policy", micro_batches=4)
    for layout in ("data parallel", "FSDP")
]

SECTIONS: dict[str, list[Case]] = {
    "fsdp": _every_way(),
    "tied": _every_way(sizes=TIED),
    "data_parallel": _in_linen("data parallel"),
    "tensor_parallel": _in_linen("FSDP + TP"),
    "scan": _in_linen("FSDP", sizes=SMALL._replace(scan=True)),
    "remat": _in_linen("FSDP", sizes=SMALL._replace(remat=True)),
    "accumulation": [
        *_TODAY,
        *_one_reduction("data parallel", None),
        *_one_reduction("FSDP", "window"),
        *_one_reduction("FSDP", "micro_batch"),
    ],
    "zero_1": [Case("ZeRO-1", "linen", "apply_policy")],
}
"""Cases by what `--only` takes."""


class Goal(NamedTuple):
    """What the worst of some cases may send, by target.

    Attributes:
      name: what it is about.
      cases: that are measured.
      before: MiB on the wire when the goal was set.
      most: MiB on the wire; if there are cases by hand, the factor over those.
      by_hand: the cases that they are compared with.
    """

    name: str
    cases: tuple[Case, ...]
    before: dict[str, float | None]
    most: dict[str, float]
    by_hand: tuple[Case, ...] = ()


H100, V5E = "h100:8", "tpu-v5e:8"


def _pair(h100: float | None, v5e: float | None) -> dict[str, float | None]:
    return {H100: h100, V5E: v5e}


def _jaxmp(section: str, reduce: str | None) -> tuple[Case, ...]:
    return tuple(
        case
        for case in SECTIONS[section]
        if case.way != "by hand" and case.reduce == reduce
    )


def _accumulation(layout: str, reduce: str, gather: str | None) -> tuple[Case, ...]:
    return tuple(
        case
        for case in SECTIONS["accumulation"]
        if case.data_axes
        and (case.layout, case.reduce, case.gather) == (layout, reduce, gather)
    )


_TIED_BY_HAND = tuple(c for c in SECTIONS["tied"] if c.way == "by hand")

GOALS = (
    Goal("FSDP", _jaxmp("fsdp", None), _pair(10.5, 11.3), _pair(9.7, 11.3)),
    Goal(
        "FSDP, reduce=float32",
        _jaxmp("fsdp", "float32"),
        _pair(None, None),
        _pair(13.2, 14.9),
    ),
    Goal(
        "FSDP + TP, reduce=float32",
        _jaxmp("tensor_parallel", "float32"),
        _pair(None, None),
        _pair(10.7, 12.2),
    ),
    Goal(
        "data parallel, 4 micro-batches, bfloat16",
        _accumulation("data parallel", "bfloat16", None),
        _pair(42, 42),
        _pair(8.8, 8.8),
    ),
    Goal(
        "data parallel, 4 micro-batches, float32",
        _accumulation("data parallel", "float32", None),
        _pair(42, 42),
        _pair(17.6, 17.6),
    ),
    Goal(
        "FSDP, 4 micro-batches, gather=window, bfloat16",
        _accumulation("FSDP", "bfloat16", "window"),
        _pair(33, 42),
        _pair(8.8, 8.8),
    ),
    Goal(
        "FSDP, 4 micro-batches, gather=window, float32",
        _accumulation("FSDP", "float32", "window"),
        _pair(33, 42),
        _pair(13.2, 13.2),
    ),
    Goal(
        "tied model, FSDP, over by hand",
        _jaxmp("tied", None),
        _pair(90 / 63, 471 / 146),
        _pair(1.02, 1.02),
        _TIED_BY_HAND,
    ),
)
