"""Counts and confidence intervals as text."""

from __future__ import annotations

from job.numerics.statistics import wilson_interval


def percent_range(interval: tuple[float, float]) -> str:
    """Format an interval of shares: "1.0–8.5 %"."""
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f} %"


def interval_text(count: int, n: int) -> str:
    """Format the 95 % interval of a count's share: "1.0–8.5 %"."""
    return percent_range(wilson_interval(count, n))


def count_with_interval(count: int, n: int) -> str:
    """Format a count with its 95 % interval: "3/100 (1.0–8.5 %)"."""
    return f"{count}/{n} ({interval_text(count, n)})"
