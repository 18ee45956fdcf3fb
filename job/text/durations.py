"""Durations and rates: as text, and as people write them (90, 30m, 2h, 1h30m)."""

from __future__ import annotations

import re
from typing import Literal

Unit = Literal["s", "m", "h"]
_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")
_WHOLE = re.compile(rf"(?:{_PART.pattern}\s*)+")


def duration(value: object, unit: Unit) -> object:
    """Return a duration in a unit, that of a plain number; what is no text stays. Raises ValueError.

    >>> duration("90", "m"), duration("1h30m", "m"), duration("30m", "h"), duration("2 h", "s")
    (90.0, 90.0, 0.5, 7200.0)
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    try:
        return float(text)
    except ValueError:
        parts = _PART.findall(text) if _WHOLE.fullmatch(text) else []
    if not parts or any(name not in _SECONDS for _, name in parts):
        raise ValueError(f"{value!r} is no duration: write a number, or one with s, m, h or d, such as 30m or 1h30m")
    return sum(float(number) * _SECONDS[name] for number, name in parts) / _SECONDS[unit]


def duration_text(seconds: float) -> str:
    """Format a duration in at most two units: "2 min 5 s"."""
    if seconds < 60:
        return f"{int(seconds)} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def elapsed_text(seconds: float) -> str:
    """Format the time since a start as a clock: "1:02:03", or "2:03" within the first hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate_text(steps: float, seconds: float) -> str:
    """Format the rate of steps: "12 a second", or "3.1 s each" where they are slow."""
    if seconds >= steps:
        return f"{duration_text(seconds / steps)} each"
    rate = steps / max(seconds, 1e-9)
    if rate >= 1e6:
        return f"{rate / 1e6:.3g} million a second"
    return f"{rate:.0f} a second" if rate >= 999.5 else f"{rate:.3g} a second"
