"""Durations as people write them: 90, 30m, 2h, 1h30m."""

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
