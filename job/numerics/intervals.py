"""Intervals for counts; needs no torch."""

from __future__ import annotations

import math


def wilson_interval(count: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (95 % by default), as shares of n.

    Raises:
        ValueError: n is not positive or count lies outside 0 … n.
    """
    if n <= 0 or not 0 <= count <= n:
        raise ValueError(f"no interval for {count} of {n}")
    share = count / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
