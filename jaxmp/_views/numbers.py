"""Numbers as people read them: powers of two, shares, sizes, counts."""

import math

GIB = 2.0**30
MIB = 2.0**20


def power(scale: float | None) -> str:
    """A scale as `"2^15"`, or as the number that it is."""
    if not scale or scale == 1 or math.frexp(scale)[0] != 0.5:
        return f"{scale:g}"
    return f"2^{math.frexp(scale)[1] - 1}"


def percent(fraction: float) -> str:
    """A share as `"3.1 %"`; nothing for none at all."""
    if not fraction:
        return ""
    return "<0.1 %" if fraction < 0.001 else f"{100 * fraction:.1f} %"


def mib(size: int) -> str:
    """A number of bytes as `"3.1 MiB"`."""
    return f"{size / MIB:.1f} MiB" if size >= MIB / 10 else f"{size} bytes"


def counted(count: int, noun: str) -> str:
    """A number of things, as `"2 casts"`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
