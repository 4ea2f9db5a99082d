"""From which width float8 and int8 pay: what is known of it, and where from."""

from typing import NamedTuple

from jaxmp.report.compile.chips import Chip, chips

CYCLE_ESTIMATES = (
    "cycle estimates of XLA's TPU compiler for the forward and backward pass of an "
    "MLP of 8,192 rows, not timed"
)


class Payoff(NamedTuple):
    """How long a network takes under a policy that quantises.

    Attributes:
      chip: a name in `chips`.
      policy: the name of the policy.
      width: of the layers.
      time: over that of `mixed_bfloat16`; less than 1 is faster.
      source: where the figure is from.
    """

    chip: str
    policy: str
    width: int
    time: float
    source: str


payoffs = (
    Payoff("tpu7x", "mixed_fp8", 1024, 1.26, CYCLE_ESTIMATES),
    Payoff("tpu7x", "mixed_fp8", 2048, 0.98, CYCLE_ESTIMATES),
    Payoff("tpu7x", "mixed_fp8", 4096, 0.64, CYCLE_ESTIMATES),
    Payoff("tpu-v6e", "mixed_int8", 1024, 2.28, CYCLE_ESTIMATES),
    Payoff("tpu-v6e", "mixed_int8", 2048, 1.23, CYCLE_ESTIMATES),
    Payoff("tpu-v6e", "mixed_int8", 4096, 0.83, CYCLE_ESTIMATES),
    Payoff("tpu-v5e", "mixed_int8", 1024, 1.53, CYCLE_ESTIMATES),
    Payoff("tpu-v5e", "mixed_int8", 2048, 1.14, CYCLE_ESTIMATES),
    Payoff("tpu-v5e", "mixed_int8", 4096, 0.72, CYCLE_ESTIMATES),
)
"""The table, as examples/benchmarks/quantized_widths.py prints it.

Scales, rounding and transposed copies cost time that grows with the area of a matrix,
and a matmul saves time that grows with its volume.
"""


def payoff_sentence(chip: Chip, policy: str) -> str:
    """What is known of a policy on a chip; empty if nothing."""
    name = chip.name
    found = [x for x in payoffs if (chips[x.chip].name, x.policy) == (name, policy)]
    if not found:
        return ""
    first, *others = [(f"{x.time:g}x", x.width) for x in found]
    text = f"{policy} takes {first[0]} the time of mixed_bfloat16 at width {first[1]}"
    for time, width in others:
        text += f", {time} at width {width}"
    return f"{text} ({'; '.join(dict.fromkeys(x.source for x in found))})"
