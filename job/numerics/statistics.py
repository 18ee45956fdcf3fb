"""Confidence intervals of proportions and means; needs no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

RESAMPLES = 2000


def wilson_interval(count: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of count / n (95 % by default). Raises ValueError."""
    if n <= 0 or not 0 <= count <= n:
        raise ValueError(f"no interval for {count} of {n}")
    share = count / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def upper_mean(values: Sequence[float], z: float) -> float:
    """Return the mean of values plus `z` of its standard errors; the mean itself of one value. Raises ValueError."""
    if not values:
        raise ValueError("no bound for the mean of no values")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean
    return mean + z * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed. Raises ValueError."""
    if not values:
        raise ValueError("no quantile of no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def difference_interval(before: tuple[int, int], after: tuple[int, int]) -> tuple[float, float]:
    """Return the 95 % interval of a change between two (count, n): Newcombe's hybrid of Wilson intervals (1998).

    It assumes independent samples; on the same prompts the true interval is narrower. Raises ValueError.
    """
    (low_1, high_1), (low_2, high_2) = wilson_interval(*before), wilson_interval(*after)
    share_1, share_2 = before[0] / before[1], after[0] / after[1]
    change = share_2 - share_1
    down = math.hypot(share_2 - low_2, high_1 - share_1)
    up = math.hypot(high_2 - share_2, share_1 - low_1)
    return change - down, change + up


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of sum(parts) / sum(wholes). Raises ValueError."""
    if not parts or len(parts) != len(wholes):
        raise ValueError(f"no interval for {len(parts)} parts of {len(wholes)}")
    source = random.Random(0)
    pairs = list(zip(parts, wholes, strict=True))
    ratios = []
    for _ in range(RESAMPLES):
        drawn = source.choices(pairs, k=len(pairs))
        ratios.append(math.fsum(part for part, _ in drawn) / math.fsum(whole for _, whole in drawn))
    ratios.sort()
    return ratios[round(0.025 * (RESAMPLES - 1))], ratios[round(0.975 * (RESAMPLES - 1))]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean; 2000 resamples, fixed seed. Raises ValueError."""
    if not values:
        raise ValueError("no interval for the mean of no values")
    source = random.Random(0)
    n = len(values)
    means = sorted(math.fsum(source.choices(values, k=n)) / n for _ in range(RESAMPLES))
    return means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]
